"""What each member of a cluster can and cannot do on a real nats-server with the generated configuration."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamConfig

from bus.connection import settle
from bus.credentials import Credentials
from bus.permissions import BUCKETS, STREAMS, allowed, edge_api
from bus.streams import deployments_bucket, ensure_streams, leader_bucket, nodes_bucket
from schemas import subjects
from schemas.base import DeploymentName, Digest, LifeId, NodeId
from tests.security.guarded_bus import GuardedServer, Member, credentials, guarded

N0, N1, CHAT = NodeId("n0"), NodeId("n1"), DeploymentName("chat")
ORCHESTRATOR = credentials("orchestrator", "orchestrator")
AGENT, OTHER = credentials(N0, "agent"), credentials(N1, "agent")
CLIENT, OPERATOR, OBSERVER = (
    credentials("app", "client"),
    credentials("ops", "operator"),
    credentials("eye", "observer"),
)
ARCHIVIST = credentials("shelf", "archivist")
MEMBERS = (ORCHESTRATOR, AGENT, OTHER, CLIENT, OPERATOR, OBSERVER, ARCHIVIST)
DENIED_S = 0.3
"""A denied question to JetStream is answered by nobody."""
SOON_S = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    """One server for all tests that leave nothing behind, with the streams and buckets of a cluster."""
    with guarded(tmp_path_factory.mktemp("guarded"), MEMBERS) as server:
        asyncio.run(_make_streams(server.url))
        yield server


async def _make_streams(url: str) -> None:
    async with member(url, ORCHESTRATOR) as orchestrator:
        js = await ensure_streams(orchestrator.client)
        await deployments_bucket(js)
        await nodes_bucket(js)
        await leader_bucket(js, 3.0)
        assert orchestrator.refused == []


@asynccontextmanager
async def member(url: str, who: Credentials) -> AsyncIterator[Member]:
    """A connection with these credentials."""
    connected = await Member(who).log_in(url)
    try:
        yield connected
    finally:
        await connected.client.close()


async def nobody(_: Msg) -> None:
    raise AssertionError("nothing may come here")


AN_AGENT_MAY_NOT_SAY = {
    "a plan": subjects.plan(CHAT),
    "the word of a new leader": subjects.LEADER,
    "a beacon": subjects.BEACON,
    "a roster": subjects.ROSTER,
    "another's capacity": subjects.capacity(N1),
    "another's receipt": subjects.receipt(N1),
    "another's audit event": subjects.audit(N1, "plan_applied"),
    "the orchestrator's audit event": subjects.audit(NodeId("orchestrator"), "plan_applied"),
    "advice to stage": subjects.staging(N1),
    "that it stands by": subjects.standby(N0),
    "desired state": f"$KV.{subjects.BUCKET_DEPLOYMENTS}.chat",
    "a wish for a node": f"$KV.{subjects.BUCKET_NODES}.n1",
    "the lease": f"$KV.{subjects.BUCKET_LEADER}.leader",
    "a request of an operator": subjects.control("remove"),
    "an answer to an operator": "_INBOX.operator.ops.x",
    "an answer to an orchestrator": "_INBOX.orchestrator.orchestrator.x",
    "what a server says": "$SYS.REQ.SERVER.PING",
}


@pytest.mark.parametrize("subject", AN_AGENT_MAY_NOT_SAY.values(), ids=AN_AGENT_MAY_NOT_SAY)
async def test_an_agent_cannot_say(server: GuardedServer, subject: str) -> None:
    async with member(server.url, AGENT) as agent:
        assert await agent.is_refused(agent.client.publish(subject, b"x")) == f'publish to "{subject.lower()}"'


AN_AGENT_MAY_NOT_HEAR = {
    "another's frames": subjects.activation(N1),
    "everybody's frames": subjects.activation(NodeId("*")),
    "another's inbox": "_INBOX.agent.n1.>",
    "everybody's inboxes": "_INBOX.>",
    "a client's inbox": "_INBOX.client.app.>",
    "every request": subjects.infer(DeploymentName("*")),
    "requests, in a queue of its own": (subjects.infer(CHAT), "mine"),
    "everybody who asks for the roster": subjects.ROSTER_NEWEST,
    "requests of operators": subjects.control("*"),
    "others' receipts": subjects.ALL_RECEIPTS,
    "the trail": subjects.ALL_AUDIT,
    "the journal": subjects.ALL_JOURNAL,
    "another's advice": subjects.staging(N1),
    "desired state": "$KV.>",
    "what others ask JetStream": "$JS.>",
    "everything": ">",
}


@pytest.mark.parametrize("heard", AN_AGENT_MAY_NOT_HEAR.values(), ids=AN_AGENT_MAY_NOT_HEAR)
async def test_an_agent_cannot_hear(server: GuardedServer, heard: str | tuple[str, str]) -> None:
    subject, queue = heard if isinstance(heard, tuple) else (heard, "")
    async with member(server.url, AGENT) as agent:
        refused = await agent.is_refused(agent.client.subscribe(subject, queue, cb=nobody))
        assert refused.startswith(f'subscription to "{subject.lower()}"')


DESTRUCTION: dict[str, tuple[str, Callable[[JetStreamContext, str, str], Awaitable[object]]]] = {
    "deletes": ("stream.delete", lambda js, _, stream: js.delete_stream(stream)),
    "purges": ("stream.purge", lambda js, _, stream: js.purge_stream(stream)),
    "edits": ("stream.update", lambda js, _, stream: js.update_stream(StreamConfig(name=stream, max_msgs=1))),
    "removes a message of": (
        "stream.msg.delete",
        lambda js, prefix, stream: js.publish(f"{prefix}.STREAM.MSG.DELETE.{stream}", b'{"seq":1}'),
    ),
}


@pytest.mark.parametrize("who", MEMBERS, ids=lambda who: who.role + " " + who.name)
@pytest.mark.parametrize("how", DESTRUCTION)
async def test_nobody_at_all(server: GuardedServer, who: Credentials, how: str) -> None:
    """... deletes, purges or edits the audit stream, nor removes a message of it: not even an orchestrator.

    But for an archivist, who makes it anew once it is exported, and cannot take single events out either.
    """
    verb, destroy = DESTRUCTION[how]
    if who is ARCHIVIST and verb in ("stream.delete", "stream.update"):
        return
    async with member(server.url, who) as connected:
        for prefix in {who.api_prefix, "$JS.API"}:
            js = connected.client.jetstream(timeout=DENIED_S, prefix=prefix)
            refused = await connected.is_refused(destroy(js, prefix, subjects.STREAM_AUDIT))
            assert refused == f'publish to "{prefix.lower()}.{verb}.resplit_audit"'


@pytest.mark.parametrize("stream", [s for s in STREAMS if s != subjects.STREAM_AUDIT] + [f"KV_{b}" for b in BUCKETS])
async def test_an_archivist_destroys_no_other_stream(server: GuardedServer, stream: str) -> None:
    async with member(server.url, ARCHIVIST) as archivist:
        for verb, destroy in DESTRUCTION.values():
            js = archivist.client.jetstream(timeout=DENIED_S)
            refused = await archivist.is_refused(destroy(js, "$JS.API", stream))
            assert refused == f'publish to "$js.api.{verb}.{stream.lower()}"'


@pytest.mark.parametrize("stream", [stream for stream in STREAMS if stream != subjects.STREAM_JOURNAL])
async def test_an_agent_destroys_no_stream(server: GuardedServer, stream: str) -> None:
    async with member(server.url, AGENT) as agent:
        for verb, destroy in DESTRUCTION.values():
            for prefix in (AGENT.api_prefix, "$JS.API"):
                js = agent.client.jetstream(timeout=DENIED_S, prefix=prefix)
                refused = await agent.is_refused(destroy(js, prefix, stream))
                assert refused == f'publish to "{prefix.lower()}.{verb}.{stream.lower()}"'


@pytest.mark.parametrize("stream", [*STREAMS, *(f"KV_{bucket}" for bucket in BUCKETS)])
async def test_an_agent_makes_neither_streams_nor_consumers(server: GuardedServer, stream: str) -> None:
    """A consumer delivers what it reads to any subject, whatever its maker may say there."""
    async with member(server.url, AGENT) as agent:
        for prefix in (AGENT.api_prefix, "$JS.API"):
            js = agent.client.jetstream(timeout=DENIED_S, prefix=prefix)
            made = await agent.is_refused(js.add_stream(StreamConfig(name=stream, subjects=["x"])))
            assert made == f'publish to "{prefix.lower()}.stream.create.{stream.lower()}"'
            for consume in (js.pull_subscribe(">", stream=stream), js.subscribe(">", stream=stream)):
                assert f'"{prefix.lower()}.consumer.create.' in await agent.is_refused(consume)
            pull = agent.client.publish(f"{prefix}.CONSUMER.MSG.NEXT.{stream}.x", b"", subjects.control("remove"))
            assert f'"{prefix.lower()}.consumer.msg.next.' in await agent.is_refused(pull)


@pytest.mark.parametrize("stream", [subjects.STREAM_AUDIT, subjects.STREAM_RECEIPTS, *(f"KV_{b}" for b in BUCKETS)])
async def test_an_agent_reads_neither_desired_state_nor_what_others_said(server: GuardedServer, stream: str) -> None:
    async with member(server.url, AGENT) as agent:
        for prefix in (AGENT.api_prefix, "$JS.API"):
            js = agent.client.jetstream(timeout=DENIED_S, prefix=prefix)
            for read in (js.get_msg(stream, 1), js.get_msg(stream, 1, direct=True), js.stream_info(stream)):
                assert stream.lower() in await agent.is_refused(read)


async def test_an_agent_that_addresses_itself_may_not_answer_anywhere(server: GuardedServer) -> None:
    """With `allow_responses` it could say everything: whoever gets a message may publish to its return address."""
    async with member(server.url, AGENT) as agent:
        got: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def arrived(msg: Msg) -> None:
            got.set_result(msg.reply)

        await agent.client.subscribe(subjects.activation(N0), cb=arrived)
        await agent.client.publish(subjects.activation(N0), b"", subjects.control("remove"))
        async with asyncio.timeout(SOON_S):
            address = await got
        assert address == subjects.control("remove")
        assert await agent.is_refused(agent.client.publish(address, b"{}")) == f'publish to "{address}"'


async def test_an_answer_that_an_agent_asks_for_reaches_nothing_that_steers_the_cluster(server: GuardedServer) -> None:
    """nats-server answers wherever it is asked to, past all permissions: with one account for all, over a key of
    desired state, into the log of plans, to the orchestrator as a request."""
    targets = (
        f"$KV.{subjects.BUCKET_DEPLOYMENTS}.chat",
        f"$KV.{subjects.BUCKET_LEADER}.leader",
        subjects.plan(CHAT),
        subjects.LEADER,
        subjects.receipt(N1),
        subjects.audit(N1, "plan_applied"),
        subjects.control("remove"),
        subjects.standby(N0),
    )
    questions = {
        subjects.journal(CHAT, LifeId("n0-x-0")): b'{"name":"chat"}',
        edge_api("STREAM.MSG.GET", subjects.STREAM_JOURNAL): b'{"last_by_subj":"resplit.v1.journal.chat.n0-x-0"}',
        edge_api("STREAM.INFO", subjects.STREAM_PLANS): b"",
        edge_api("STREAM.PURGE", subjects.STREAM_JOURNAL): b'{"filter":"resplit.v1.journal.none"}',
    }
    heard: list[str] = []

    async def note(msg: Msg) -> None:
        heard.append(msg.subject)

    async def stored() -> list[int]:
        js = orchestrator.client.jetstream()
        streams = [*(s for s in STREAMS if s != subjects.STREAM_JOURNAL), *(f"KV_{bucket}" for bucket in BUCKETS)]
        return [(await js.stream_info(stream)).state.last_seq for stream in streams]

    async with member(server.url, ORCHESTRATOR) as orchestrator, member(server.url, AGENT) as agent:
        for subject in (subjects.control("*"), subjects.ALL_STANDBYS):
            await orchestrator.client.subscribe(subject, cb=note)
        await settle(orchestrator.client)
        before = await stored()
        for target in targets:
            for question, data in questions.items():
                await agent.client.publish(question, data, target)
        await settle(agent.client)
        await settle(orchestrator.client)
        js = agent.client.jetstream()
        assert (await js.get_last_msg(subjects.STREAM_JOURNAL, subjects.journal(CHAT, LifeId("n0-x-0")))).seq, (
            "it works"
        )
        assert (heard, await stored()) == ([], before)
        assert agent.refused == []


@pytest.mark.parametrize("verb", ["deploy", "place", "remove", "drain", "undrain", "trust", "plan"])
async def test_only_operators_may_ask_for_changes(server: GuardedServer, verb: str) -> None:
    for who in (CLIENT, OBSERVER, AGENT):
        async with member(server.url, who) as connected:
            asked = connected.client.publish(subjects.control(verb), b"{}")
            assert await connected.is_refused(asked) == f'publish to "{subjects.control(verb)}"'


async def test_a_client_only_asks(server: GuardedServer) -> None:
    async with member(server.url, CLIENT) as client:
        for subject in (subjects.ALL_CAPACITY, subjects.ALL_CANCEL, subjects.infer(CHAT), "_INBOX.client.other.>"):
            refused = await client.is_refused(client.client.subscribe(subject, cb=nobody))
            assert refused.startswith(f'subscription to "{subject.lower()}"')
        others = subjects.blob(Digest("0" * 64)), subjects.activation(N0), subjects.capacity(N0), "$JS.API.STREAM.NAMES"
        for subject in (*AN_AGENT_MAY_NOT_SAY.values(), *others):
            refused = await client.is_refused(client.client.publish(subject, b""))
            assert refused == f'publish to "{subject.lower()}"'


async def test_what_is_refused_above_is_heard_where_it_is_allowed(server: GuardedServer) -> None:
    """So that a server that refuses everything, or carries nothing, fails here."""
    async with (
        member(server.url, ORCHESTRATOR) as orchestrator,
        member(server.url, AGENT) as agent,
        member(server.url, OTHER) as other,
        member(server.url, CLIENT) as client,
    ):
        heard: asyncio.Queue[str] = asyncio.Queue()

        async def note(msg: Msg) -> None:
            heard.put_nowait(msg.subject)

        await agent.client.subscribe(subjects.ALL_PLANS, cb=note)
        await agent.client.subscribe(subjects.infer(CHAT), subjects.INGRESS_QUEUE, cb=note)
        await other.client.subscribe(subjects.activation(N1), cb=note)
        await asyncio.gather(settle(agent.client), settle(other.client))
        said = {
            subjects.plan(CHAT): orchestrator,
            subjects.activation(N1): agent,
            subjects.infer(CHAT): client,
        }
        for subject, speaker in said.items():
            await speaker.client.publish(subject, b"x")
            async with asyncio.timeout(SOON_S):
                assert await heard.get() == subject
        js = orchestrator.client.jetstream()
        before = (await js.stream_info(subjects.STREAM_AUDIT)).state.messages
        await agent.client.jetstream().publish(subjects.audit(N0, "plan_applied"), b"x")
        assert (await js.stream_info(subjects.STREAM_AUDIT)).state.messages == before + 1
        await (await deployments_bucket(js)).put("chat", b"{}")
        assert orchestrator.refused == agent.refused == other.refused == client.refused == []


async def test_an_observer_says_nothing_to_anybody_but_the_orchestrator(server: GuardedServer) -> None:
    async with member(server.url, OBSERVER) as observer:
        for subject in (subjects.infer(CHAT), subjects.capacity(N0), subjects.audit(N0, "x"), subjects.plan(CHAT)):
            assert await observer.is_refused(observer.client.publish(subject, b"")) == f'publish to "{subject}"'


async def test_an_orchestrator_reads_no_request_and_no_reply(server: GuardedServer) -> None:
    async with member(server.url, ORCHESTRATOR) as orchestrator:
        for subject in (subjects.infer(CHAT), subjects.ALL_JOURNAL, "_INBOX.client.>", "_INBOX.agent.n0.>"):
            refused = await orchestrator.is_refused(orchestrator.client.subscribe(subject, cb=nobody))
            assert refused.startswith(f'subscription to "{subject.lower()}"')
        js = orchestrator.client.jetstream(timeout=DENIED_S)
        for read in (js.get_msg(subjects.STREAM_JOURNAL, 1), js.pull_subscribe(">", stream=subjects.STREAM_JOURNAL)):
            assert "resplit_journal" in await orchestrator.is_refused(read)
        for subject in (subjects.journal(CHAT, LifeId("n0-x-0")), subjects.capacity(N0), subjects.receipt(N0)):
            assert await orchestrator.is_refused(orchestrator.client.publish(subject, b"")) == f'publish to "{subject}"'


@pytest.mark.parametrize("who", MEMBERS, ids=lambda who: who.role + " " + who.name)
def test_nobody_is_allowed_anything_twice_or_without_a_reason(who: Credentials) -> None:
    may = allowed(who.login)
    for grants in (may.publish, may.subscribe):
        lines = [(grant.subject, grant.queue) for grant in grants]
        assert len(set(lines)) == len(lines)
        assert all(grant.why for grant in grants)
        assert not any(grant.subject in {">", "_INBOX.>", "$JS.>", "$JS.API.>", "$KV.>"} for grant in grants)


async def test_without_a_login_nobody_gets_in(server: GuardedServer) -> None:
    with pytest.raises(NatsError, match="Authorization Violation"):
        await Member(AGENT).log_in(server.url, nkeys_seed_str=None)


async def test_an_unknown_key_does_not_get_in_under_a_known_name(server: GuardedServer) -> None:
    with pytest.raises(NatsError, match="Authorization Violation"):
        await Member(credentials(AGENT.name, AGENT.role)).log_in(server.url)

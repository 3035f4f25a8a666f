"""With a login each, the members of a cluster can do all that their parts need: the real code, a real nats-server."""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from agent.busroad import BusRoad
from agent.plans import PlanInbox
from agent.replies import Replier
from bus.audit import AuditTrail
from bus.blobs import BlobServer, fetch, size_of
from bus.connection import connect, settle
from bus.credentials import Credentials, inbox_prefix
from bus.enrolment import renew, revoke
from bus.folders import ROSTER
from bus.following import RosterInbox, ask_for_roster, offer_roster, publish_roster
from bus.founding import load_holder
from bus.identity import Identity, load_identity, read_roster
from bus.journal import Journal, SupersededError
from bus.stopping import end
from bus.streams import deployments_bucket, ensure_streams, leader_bucket, nodes_bucket, wait_for_streams
from bus.succession import fence, lives, release
from bus.together import CLUSTER, make_members
from models.store import Store
from orchestrator.fold import ReceiptReceived, Report
from orchestrator.inbox import Inbox, Rejections
from orchestrator.lease import Lease
from orchestrator.log import PlanLog
from orchestrator.rollout import Propose, Rollout, step
from orchestrator.wishes import Desired, stored
from resplit.chain import verify
from resplit.client import Client as RequestClient
from resplit.sealing import Sealer
from resplit.standing import trust_of
from resplit.trail import read_trail
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, LifeId, NodeId, RequestId
from schemas.codec import encode
from schemas.deployment import NodeWish, Settings, Stage
from schemas.envelope import RECEIPT_TYPE, seal
from schemas.journal import AcceptedRequest, Run
from schemas.plan import PlanEvent, Receipt, ReceiptStatus
from schemas.request import TokenReply
from schemas.section import EventSection, nothing_of, section_of
from tests.nodes import plan_of
from tests.security.guarded_bus import credentials, guarded

N0, N1, CHAT = NodeId("n0"), NodeId("n1"), DeploymentName("chat")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SOON_S = 10.0


@dataclass
class Cluster:
    """A connection of each member, and the identities with which they sign."""

    url: str
    orchestrator: Client
    n0: Client
    n1: Client
    operator: Client
    observer: Client
    app: Credentials
    keys: Path

    def identity(self, name: str) -> Identity:
        return load_identity(self.keys / name, NodeId(name))


@pytest_asyncio.fixture
async def cluster(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Cluster]:
    """A cluster of two agents; afterwards, nothing that any of them did was refused."""
    make_members(tmp_path / "keys", [N0, N1])
    app = credentials("app", "client")
    members = [
        credentials("orchestrator", "orchestrator"),
        credentials(N0, "agent"),
        credentials(N1, "agent"),
        credentials("ops", "operator"),
        credentials("eye", "observer"),
    ]
    caplog.set_level(logging.WARNING)
    with guarded(tmp_path / "nats", [*members, app]) as server:
        clients = [await connect(server.url, member.name, credentials=member) for member in members]
        orchestrator, n0, n1, operator, observer = clients
        await ensure_streams(orchestrator)
        yield Cluster(server.url, orchestrator, n0, n1, operator, observer, app, tmp_path / "keys")
        for client in clients:
            await client.close()
        assert "Violation" not in server.log
    assert "the NATS server refuses" not in caplog.text


def prepared() -> PlanEvent:
    """The first event of a plan of one stage."""
    stages = [Stage(node=N0, first=0, last=0)]
    plan = plan_of(1, stages, Settings(), 1).model_copy(update={"deployment": CHAT})
    taken = step(Rollout(CHAT, term=1), Propose(plan), NOW)
    assert taken is not None
    return taken[1]


async def test_heartbeats_are_heard_by_all_who_look_after_nodes(cluster: Cluster) -> None:
    heard: set[str] = set()
    listeners = {
        "n1": cluster.n1,
        "orchestrator": cluster.orchestrator,
        "ops": cluster.operator,
        "eye": cluster.observer,
    }
    for name, client in listeners.items():

        async def note(_: Msg, name: str = name) -> None:
            heard.add(name)

        await client.subscribe(subjects.ALL_CAPACITY, cb=note)
        await client.flush()
    async with asyncio.timeout(SOON_S):
        while heard != set(listeners):
            await cluster.n0.publish(subjects.capacity(N0), b"a heartbeat")
            await asyncio.sleep(0.01)


async def test_plans_reach_agents_live_and_from_the_log(cluster: Cluster) -> None:
    log = PlanLog(cluster.orchestrator.jetstream(), cluster.identity("orchestrator"))
    early: asyncio.Queue[EventSection] = asyncio.Queue()
    late: asyncio.Queue[EventSection] = asyncio.Queue()
    js = await wait_for_streams(cluster.n0)
    n0, n1 = cluster.identity(N0), cluster.identity(N1)
    running = [asyncio.create_task(PlanInbox(cluster.n0, n0, AuditTrail(js, n0), early.put_nowait).run())]
    try:
        await settle(cluster.n0)
        await log.take_office(N0, NOW, lambda _, error: pytest.fail(str(error)))
        await log.append(prepared())
        js = cluster.n1.jetstream()
        running.append(asyncio.create_task(PlanInbox(cluster.n1, n1, AuditTrail(js, n1), late.put_nowait).run()))
        async with asyncio.timeout(SOON_S):
            assert await early.get() == section_of(prepared(), N0)
            assert await late.get() == nothing_of(prepared())
    finally:
        await end(running)


async def test_a_roster_reaches_every_member_live_and_from_the_log(cluster: Cluster) -> None:
    await offer_roster(cluster.orchestrator.jetstream(), cluster.identity("orchestrator"))
    running = []

    async def follow(client: Client, name: str) -> tuple[Identity, asyncio.Event]:
        identity, changed = cluster.identity(name), asyncio.Event()
        inbox = RosterInbox(client, identity, AuditTrail(client.jetstream(), identity), changed.set)
        running.append(asyncio.create_task(inbox.run()))
        return identity, changed

    following = [await follow(cluster.n0, N0), await follow(cluster.orchestrator, "orchestrator")]
    root = cluster.keys / CLUSTER
    roster = revoke(root, N1, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
    try:
        await settle(cluster.n0)
        await settle(cluster.orchestrator)
        await publish_roster(cluster.operator.jetstream(), (root / ROSTER).read_bytes())
        following.append(await follow(cluster.n1, N1))
        for identity, changed in following:
            async with asyncio.timeout(SOON_S):
                await changed.wait()
            assert identity.roster == roster
            assert list(identity.agents) == [N0]
    finally:
        await end(running)


async def test_whoever_follows_no_stream_is_told_the_newest_roster_and_hears_of_later_ones(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Clients, by the agents; operators and observers, by the orchestrators. Nobody else's subject is answered on."""
    app = await connect(cluster.url, "app", credentials=cluster.app)
    asking = (app, cluster.operator, cluster.observer)
    shutil.copytree(cluster.keys / "client", tmp_path / "own")
    sealer = Sealer(tmp_path / "own")
    assert await ask_for_roster(app) is None, "nobody answers yet, and nobody waits for long"
    root = cluster.keys / CLUSTER
    renewed = as_renewed(root)
    answering = []
    for client, name in ((cluster.n0, N0), (cluster.orchestrator, "orchestrator")):
        identity = cluster.identity(name)
        await identity.take_roster(renewed)
        inbox = RosterInbox(client, identity, AuditTrail(client.jetstream(), identity))
        answering.append(asyncio.create_task(inbox.run()))
        await settle(client)
    elsewhere = subjects.journal(CHAT, LifeId("n0-x-0"))
    before = (await cluster.orchestrator.jetstream().stream_info(subjects.STREAM_JOURNAL)).state.last_seq
    try:
        for client in asking:
            assert await ask_for_roster(client) == renewed
        await sealer.follow(app)
        assert read_roster(tmp_path / "own") == read_roster(root)
        newest = as_renewed(root)
        await publish_roster(cluster.operator.jetstream(), newest)
        async with asyncio.timeout(SOON_S):
            while (tmp_path / "own" / ROSTER).read_bytes() != newest:  # noqa: ASYNC110 (files tell nobody)
                await asyncio.sleep(0.01)
        await app.publish(subjects.ROSTER_NEWEST, b"", elsewhere)
        assert await ask_for_roster(app) is not None, "and that was answered after it"
        after = (await cluster.orchestrator.jetstream().stream_info(subjects.STREAM_JOURNAL)).state.last_seq
        assert after == before
    finally:
        await end(answering)
        await app.close()
    await Sealer(tmp_path / "own").follow(app)  # which is closed by now, and no reason not to go on


def as_renewed(root: Path) -> bytes:
    """The cluster's next roster."""
    renew(root, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
    return (root / ROSTER).read_bytes()


async def test_a_roster_that_cannot_be_offered_yet_is_said_and_offered_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that has not taken up its streams is no reason to end, and not passed over in silence."""
    make_members(tmp_path / "keys", [N0])
    member, identity = credentials("orchestrator", "orchestrator"), load_identity(tmp_path / "keys" / N0, N0)
    with guarded(tmp_path / "nats", [member]) as server:
        client = await connect(server.url, "orchestrator", credentials=member)
        offering = asyncio.create_task(offer_roster(client.jetstream(), identity))
        try:
            async with asyncio.timeout(SOON_S):
                while "could not be offered to the bus yet" not in caplog.text:  # noqa: ASYNC110 (a log tells nobody)
                    await asyncio.sleep(0.05)
            assert not offering.done()
            js = await ensure_streams(client)
            async with asyncio.timeout(SOON_S):
                await offering
            found = await js.get_last_msg(subjects.STREAM_PLANS, subjects.ROSTER)
            assert found.data == (identity.folder / ROSTER).read_bytes()
        finally:
            await end([offering])
            await client.close()


async def test_receipts_reach_the_orchestrator(cluster: Cluster) -> None:
    n0 = cluster.identity(N0)
    receipt = Receipt(
        node=N0, deployment=CHAT, epoch=1, plan=prepared().plans[0].digest, status=ReceiptStatus.READY, elapsed_ms=1
    )
    await cluster.n0.jetstream().publish(subjects.receipt(N0), seal(receipt, RECEIPT_TYPE, n0.name, n0.key))
    heard: asyncio.Queue[Report] = asyncio.Queue()
    identity = cluster.identity("orchestrator")
    rejections = Rejections(AuditTrail(cluster.orchestrator.jetstream(), identity))
    hearing = asyncio.create_task(Inbox(identity, rejections, heard.put_nowait).hear_receipts(cluster.orchestrator))
    try:
        async with asyncio.timeout(SOON_S):
            assert await heard.get() == ReceiptReceived(receipt)
    finally:
        await end([hearing])


async def test_an_agent_inherits_what_another_had_accepted(cluster: Cluster) -> None:
    superseded: asyncio.Future[SupersededError] = asyncio.get_running_loop().create_future()
    first, second = LifeId("n0-x-0"), LifeId("n1-x-0")
    journal = Journal(cluster.n0, CHAT, first, superseded.set_result, asyncio.get_running_loop().time)
    running = asyncio.create_task(journal.run())
    try:
        async with asyncio.timeout(SOON_S):
            request = AcceptedRequest(RequestId("r"), "0" * 64, b"{}", "application/json", "_INBOX.client.app.x", 7, 9)
            handle = await journal.accept(request)
            told = asyncio.Event()
            journal.tokens([Run(handle, 0, (5, 6))], told.set)
            await told.wait()
            assert [life.life for life in await lives(cluster.n1, CHAT)] == [first]
            owed = await fence(cluster.n1, CHAT, first, second)
            assert [(one.request.request_id, one.tokens) for one in owed.requests] == [("r", (5, 6))]
            journal.tokens([Run(handle, 2, (7,))], lambda: pytest.fail("a life that was fenced stores nothing"))
            assert (await superseded).by == second
            await release(cluster.n1, owed)
            [left] = await lives(cluster.n1, CHAT)
            assert (left.messages, left.fenced_by) == (1, second)
    finally:
        await end([running])


async def test_the_trail_is_written_by_each_and_read_by_observers_and_operators(cluster: Cluster) -> None:
    for name, client in ((N0, cluster.n0), (N1, cluster.n1), ("orchestrator", cluster.orchestrator)):
        trail = AuditTrail(client.jetstream(), cluster.identity(name))
        trail.record(AuditKind.PLAN_APPLIED, "a test")
        writing = asyncio.create_task(trail.run())
        await trail.drain(SOON_S)
        await end([writing])
    for reader in (cluster.observer, cluster.operator):
        envelopes = [data async for data in read_trail(reader.jetstream(), follow=False)]
        verdict = verify(envelopes, trust_of(cluster.identity(N0).roster))
        assert verdict.is_sound
        assert {life.writer: life.is_ended for life in verdict.lives} == {N0: True, N1: True, "orchestrator": True}


async def test_files_go_from_the_orchestrator_to_an_agent_and_on_to_the_next(cluster: Cluster, tmp_path: Path) -> None:
    source, first, second = (Store(tmp_path / name) for name in ("source", "first", "second"))
    file = source.put(bytes(range(256)) * 5000)
    server = BlobServer(cluster.orchestrator, source)
    await server.offer([file.digest])
    await settle(cluster.orchestrator)
    assert await size_of(cluster.n0, file.digest) == file.size_bytes
    await fetch(cluster.n0, first, file.digest, file.size_bytes)
    await server.withdraw([file.digest])
    await BlobServer(cluster.n0, first).offer([file.digest])
    await asyncio.gather(settle(cluster.orchestrator), settle(cluster.n0))
    await fetch(cluster.n1, second, file.digest, file.size_bytes)
    assert second.read(file.digest) == source.read(file.digest)


async def test_frames_and_pings_go_over_the_bus_where_there_is_no_link(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: asyncio.Queue[tuple[NodeId, bytes]] = asyncio.Queue()
    seen = []
    publish = cluster.n0.publish

    async def watched(subject: str, data: bytes = b"", *arguments: Any, **options: Any) -> None:
        seen.append(data)
        await publish(subject, data, *arguments, **options)

    monkeypatch.setattr(cluster.n0, "publish", watched)
    gone: asyncio.Queue[NodeId] = asyncio.Queue()
    a = BusRoad(cluster.n0, cluster.identity(N0), lambda *_: None, gone.put_nowait, lambda _: None)
    used: list[NodeId] = []
    b = BusRoad(
        cluster.n1,
        cluster.identity(N1),
        lambda node, data: came.put_nowait((node, bytes(data))),
        lambda _: None,
        used.append,
    )
    await a.start()
    await b.start()
    await asyncio.gather(settle(cluster.n0), settle(cluster.n1))
    async with asyncio.timeout(SOON_S):
        await a.send(N1, [b"x" * 1_200_000])
        assert await came.get() == (N0, b"x" * 1_200_000)
        assert used == [N0], "once, and not for each piece"
        assert sum(map(len, seen)) > 1_200_000
        assert not any(b"x" * 16 in data for data in seen), "what leaves is sealed"
        await a.ping(N1)
        while not a.history(N1).rtts:  # noqa: ASYNC110 (it is asked for, it tells nobody)
            await asyncio.sleep(0.01)
        await a.probe(NodeId("n2"))
        assert await gone.get() == "n2"


async def test_who_gets_a_message_can_say_nothing_of_others_at_its_return_address(cluster: Cluster) -> None:
    """Agents may write to each other's inboxes, since answers go there, as the server does when it says *no
    responders*."""
    shown: asyncio.Queue[Msg] = asyncio.Queue()
    gone: asyncio.Queue[NodeId] = asyncio.Queue()
    road = BusRoad(cluster.n0, cluster.identity(N0), lambda *_: None, gone.put_nowait, lambda _: None)
    await cluster.n1.subscribe(subjects.activation(N1), cb=shown.put)
    await asyncio.gather(road.start(), settle(cluster.n1))

    async def deny(*words: str) -> None:
        await cluster.n1.publish(".".join([*inbox, *words]), b"", headers={"Status": "503"})

    async with asyncio.timeout(SOON_S):
        await road.probe(N1)
        *inbox, about, proof = (await shown.get()).reply.split(".")
        assert about == N1
        await deny("n2", proof)
        await deny("n2")
        await deny("n2", "é")
        await deny(about, proof)
        assert await gone.get() == N1, "the others came before it"
        assert gone.empty()


async def test_the_orchestrator_keeps_what_is_wanted_and_the_lease(cluster: Cluster) -> None:
    js = cluster.orchestrator.jetstream()
    desired = Desired(js, await deployments_bucket(js), await nodes_bucket(js))
    wish = NodeWish(node=N0, drained=True)
    await desired.nodes.put(N0, encode(wish))
    rejections = Rejections(AuditTrail(js, cluster.identity("orchestrator")))
    assert (await stored(desired, rejections)).nodes == (wish,)
    lease = Lease(await leader_bucket(js, 3.0), NodeId("orchestrator"))
    async with asyncio.timeout(SOON_S):
        await lease.acquire()
        await lease.may_act()
    await lease.release()


async def test_requests_are_answered_and_a_client_that_left_is_noticed(cluster: Cluster) -> None:
    gone: asyncio.Queue[RequestId] = asyncio.Queue()
    replier = Replier(cluster.n0, gone.put_nowait)
    asked: asyncio.Queue[Msg] = asyncio.Queue()
    await replier.start()
    await cluster.n0.subscribe(subjects.infer(CHAT), subjects.INGRESS_QUEUE, cb=asked.put)
    await settle(cluster.n0)
    async with asyncio.timeout(SOON_S), RequestClient(cluster.url, nats_options=dict(cluster.app.nats_options)) as app:
        tokens = app.stream(CHAT, "x")
        first = asyncio.ensure_future(anext(tokens))
        msg = await asked.get()
        assert msg.reply.startswith(inbox_prefix("client", NodeId("app")) + ".")
        to = replier.to(msg)
        request = RequestId("r")
        await to.send(TokenReply(request_id=request, index=0, token_id=7, text="7"), request)
        assert (await first).text == "7"
        await tokens.aclose()
        while gone.empty():
            await to.send(TokenReply(request_id=request, index=1, token_id=8, text="8"), request)
            await asyncio.sleep(0.01)
    assert await gone.get() == request


async def test_operators_are_answered(cluster: Cluster) -> None:
    async def answer(msg: Msg) -> None:
        await msg.respond(msg.subject.encode())

    await cluster.orchestrator.subscribe(subjects.control("*"), cb=answer)
    await settle(cluster.orchestrator)
    for client, verbs in (
        (cluster.operator, ("deploy", "remove", "status")),
        (cluster.observer, ("status", "explain", "where")),
    ):
        for verb in verbs:
            reply = await client.request(subjects.control(verb), b"", timeout=SOON_S)
            assert reply.data.decode() == subjects.control(verb)

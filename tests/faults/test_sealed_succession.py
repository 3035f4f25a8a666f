"""Sealed requests while their ingress dies, their blocks move, their client leaves; and who may not be asked openly."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from nats.aio.msg import Msg

from bus.connection import settle
from bus.credentials import inbox_prefix
from bus.together import CLIENT
from resplit import control
from resplit.client import Client
from resplit.replies import RequestError
from resplit.sealing import Sealer
from schemas.audit import AuditKind
from schemas.base import DeploymentName, LifeId
from schemas.codec import CONTENT_TYPE, JSON, SEALED
from schemas.deployment import Stage
from schemas.journal import Run, Tokens, unpack_records
from schemas.roster import ROSTER_TYPE
from schemas.subjects import journal
from tests.integration.cluster_fixtures import (
    CHAT,
    EMBED,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    Serving,
    Streaming,
    command,
    error_of,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

ENDS_S = 60.0
INBOX = f"{inbox_prefix('client', CLIENT)}.sealed"
PLACEMENT = (Stage(node=N0, first=0, last=2), Stage(node=N1, first=3, last=5))
MOVED = (Stage(node=N2, first=0, last=2), Stage(node=N1, first=3, last=5))
JOURNALS = journal(CHAT, LifeId("*"))


@dataclass
class Heard:
    """What the bus saw of the replies and of the journal meanwhile."""

    replies: list[Msg] = field(default_factory=list)
    journalled: list[bytes] = field(default_factory=list)

    async def reply(self, message: Msg) -> None:
        self.replies.append(message)

    async def journal(self, message: Msg) -> None:
        self.journalled.append(message.data)

    @property
    def open_replies(self) -> list[bytes]:
        """Those that anybody can read, but for the roster, which a client that seals asks for."""
        replies = [m for m in self.replies if (m.headers or {}).get(CONTENT_TYPE) != SEALED]
        return [m.data for m in replies if ROSTER_TYPE.encode() not in m.data[:64]]

    @property
    def open_runs(self) -> list[Run]:
        """Tokens in the journal that anybody can read."""
        records = [record for data in self.journalled for record in unpack_records(data)]
        return [run for r in records if isinstance(r, Tokens) for run in r.runs if isinstance(run, Run)]


@asynccontextmanager
async def sealing(serving: Serving) -> AsyncIterator[tuple[Client, Heard]]:
    """A client that seals, and what is to be heard of it."""
    heard = Heard()
    subscriptions = [
        await serving.edge.subscribe(f"{INBOX}.>", cb=heard.reply),
        await serving.edge.subscribe(JOURNALS, cb=heard.journal),
    ]
    await settle(serving.edge)
    sealer = Sealer(serving.cluster.client_keys)
    options = {"inbox_prefix": INBOX}
    keys = serving.cluster.client_keys
    async with Client(
        serving.cluster.url, keys=keys, idle_timeout_s=ENDS_S, nats_options=options, sealer=sealer
    ) as client:
        yield client, heard
    await settle(serving.edge)
    for subscription in subscriptions:
        await subscription.unsubscribe()


async def ingress(serving: Serving) -> str:
    [found] = [found for found in (await control.status(serving.cluster.operator)).deployments if found.name == CHAT]
    assert found.current is not None
    return found.current.routes[0].source


async def test_a_killed_ingress_leaves_a_sealed_stream_to_a_successor_that_answers_sealed(spared: Serving) -> None:
    counts = (900, 500, 250, 100, 100)  # of which some wait for a slot
    killed = await ingress(spared)
    async with sealing(spared) as (client, heard):
        streams = [Streaming(client, f"{PROMPT} {count}", max_tokens=count) for count in counts]
        await streams[0].began()
        await spared.cluster.kill(killed)
        try:
            assert not streams[0].ended.done(), "it ended before its ingress did"
            for stream, count in zip(streams, counts, strict=True):
                assert await stream.end(ENDS_S) is None
                assert stream.ids == spared.oracle.tokens(f"{PROMPT} {count}", count)
                assert "".join(token.text for token in stream.tokens) == spared.oracle.text.decode(stream.ids)
            assert await ingress(spared) != killed
        finally:
            await spared.cluster.start(killed)
    assert len(heard.replies) > sum(counts)
    assert heard.journalled
    assert (heard.open_replies, heard.open_runs) == ([], [])


async def test_a_sealed_stream_crosses_to_another_plan_and_stays_sealed(spared: Serving) -> None:
    await spared.deploy(CHAT, "llama", placement=PLACEMENT, settings=SETTINGS)
    async with sealing(spared) as (client, heard):
        stream = await Streaming(client, max_tokens=900).began()
        placed = await spared.deploy(CHAT, "llama", placement=MOVED, settings=SETTINGS)
        assert placed.current is not None
        await spared.ear.wait(AuditKind.SEQUENCE_MOVED, epoch=placed.current.epoch)
        assert await stream.end(ENDS_S) is None
        assert stream.ids == spared.oracle.tokens(PROMPT, 900)
    assert (heard.open_replies, heard.open_runs) == ([], [])


async def test_a_sealed_stream_can_be_cancelled_and_left(spared: Serving) -> None:
    async with sealing(spared) as (client, heard):
        stream = await Streaming(client, max_tokens=900, request_id="cancelled").began()
        await client.cancel("cancelled")
        error = await stream.end()
        assert error is not None
        assert error.code == "cancelled"
        async for _ in client.stream(CHAT, PROMPT, max_tokens=900, ignore_eos=True, request_id="left"):
            break
    await spared.ear.wait(AuditKind.REQUEST_ENDED, request="left", code="cancelled")
    assert heard.open_replies == []


async def test_every_kind_of_request_is_answered_sealed_as_it_is_in_the_open(spared: Serving) -> None:
    await spared.deploy(EMBED, "embedder", stages=2)
    sentence = "The cut may move."
    async with sealing(spared) as (client, heard):
        embedded = await client.embed(EMBED, [sentence, sentence])
        np.testing.assert_allclose(embedded.vectors[1], spared.oracle.vector(sentence), atol=1e-5)
        scored = await client.complete(CHAT, PROMPT, max_tokens=5, logprobs=3, ignore_eos=True)
        again = await spared.client.complete(CHAT, PROMPT, max_tokens=5, logprobs=3, ignore_eos=True)
        assert (scored.token_ids, scored.logprobs, scored.top_logprobs) == (
            again.token_ids, again.logprobs, again.top_logprobs,
        )  # fmt: skip
        with pytest.raises(RequestError) as refused:
            await client.complete(CHAT, token_ids=[1 << 30])
        assert refused.value.code == "token_out_of_range"
    assert heard.open_replies == []
    keys = str(spared.cluster.client_keys)
    arguments = ("--url", spared.cluster.url, "--keys", keys, "--sealed", "--max-tokens", "5", "--json")
    code, out, _ = await command("infer", CHAT, PROMPT, *arguments)
    answer = await spared.client.complete(CHAT, PROMPT, max_tokens=5)
    assert (code, [json.loads(line)["token_id"] for line in out.splitlines()]) == (0, list(answer.token_ids))
    await control.remove(spared.cluster.operator, DeploymentName(EMBED))


async def test_a_deployment_may_take_sealed_requests_alone(spared: Serving) -> None:
    sealed = await spared.deploy(CHAT, "llama", placement=PLACEMENT, settings=SETTINGS, sealed=True)
    assert sealed.current is not None
    assert sealed.current.sealed
    assert await spared.refused(CHAT, {"prompt": PROMPT}) == ("forbidden", None)
    async with sealing(spared) as (client, _):
        answer = await client.complete(CHAT, PROMPT, max_tokens=4, ignore_eos=True)
        assert answer.token_ids == spared.oracle.tokens(PROMPT, 4)
    await spared.deploy(CHAT, "llama", placement=PLACEMENT, settings=SETTINGS)
    await spared.answers()


async def test_what_does_not_open_is_refused_in_the_open_and_under_its_id(spared: Serving) -> None:
    sealer = Sealer(spared.cluster.client_keys)
    request = json.dumps({"request_id": "mine", "prompt": PROMPT, "max_tokens": 1}).encode()
    good = sealer.seal(CHAT, "mine", request, JSON)
    elsewhere = sealer.seal(EMBED, "mine", request, JSON)
    renamed = sealer.seal(CHAT, "other", request, JSON)
    for data, headers, code, field_ in (
        (elsewhere.data, elsewhere.headers, "bad_signature", None),
        (good.data, renamed.headers, "bad_signature", None),
        (good.data, {CONTENT_TYPE: SEALED}, "invalid_request", "Resplit-Request"),
        (good.data, {**good.headers, "Resplit-Request": "a b"}, "invalid_request", "Resplit-Request"),
        (b"no letter", good.headers, "invalid_request", "letter"),
    ):
        reply = await spared.bus.say(CHAT, data, headers=headers)
        assert error_of(reply) == (code, field_)
        assert reply.get("request_id") == {"mine": "mine", "other": "other"}.get(headers.get("Resplit-Request", ""))
    message = await spared.bus.nats.request(f"resplit.v1.infer.{CHAT}", renamed.data, 10, headers=renamed.headers)
    assert message.headers is not None
    opened = renamed.open(message.data, message.headers[CONTENT_TYPE])
    assert opened is not None
    assert error_of(json.loads(opened)) == ("invalid_request", "request_id")


async def test_a_letter_that_is_sent_again_is_answered_to_its_client_alone(spared: Serving) -> None:
    """Whoever heard it can send it once more, to an inbox of his own: what comes there he cannot read."""
    sealed = Sealer(spared.cluster.client_keys).seal(
        CHAT, "twice", json.dumps({"request_id": "twice", "prompt": PROMPT, "max_tokens": 2}).encode(), JSON
    )
    answers = []
    for _ in range(2):
        message = await spared.bus.nats.request(f"resplit.v1.infer.{CHAT}", sealed.data, 10, headers=sealed.headers)
        assert message.headers is not None
        assert PROMPT.encode() not in message.data
        opened = sealed.open(message.data, message.headers[CONTENT_TYPE])
        assert opened is not None
        answers.append(json.loads(opened)["token_ids"])
    assert answers[0] == answers[1]

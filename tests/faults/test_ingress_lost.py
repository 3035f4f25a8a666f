"""An ingress that is killed, told to stop or hangs: its requests end as if nothing had happened, said by another."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from nats.aio.msg import Msg

from agent.neighbours import SILENT_S
from bus.connection import settle
from resplit import control
from resplit.client import Client
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.deployment import Stage
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, SETTINGS, Plain, Serving, Streaming

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

ENDS_S = 60.0
INBOX = "_INBOX.client.client.heard"
STREAMED = (900, 500, 250, 60, 60, 60)
"""Tokens of each stream: three run beside one request that is not streamed, the others wait."""
WHOLE = 400
ASKED = 8


@dataclass
class Said:
    """Every reply to the streams of one client, whoever said it."""

    tokens: defaultdict[tuple[str, int], set[int]] = field(default_factory=lambda: defaultdict(set))

    async def note(self, message: Msg) -> None:
        reply: Plain = json.loads(message.data)
        if "token_id" in reply:
            self.tokens[reply["request_id"], reply["index"]].add(reply["token_id"])


@asynccontextmanager
async def heard(serving: Serving) -> AsyncIterator[tuple[Client, Said]]:
    said = Said()
    subscription = await serving.edge.subscribe(f"{INBOX}.>", cb=said.note)
    await settle(serving.edge)
    keys, options = serving.cluster.client_keys, {"inbox_prefix": INBOX}
    async with Client(serving.cluster.url, keys=keys, idle_timeout_s=ENDS_S, nats_options=options) as client:
        yield client, said
    await subscription.unsubscribe()


async def ingress(serving: Serving) -> str:
    [found] = [found for found in (await control.status(serving.cluster.operator)).deployments if found.name == CHAT]
    assert found.current is not None
    return found.current.routes[0].source


def halves(first: NodeId, second: NodeId) -> tuple[Stage, ...]:
    return (Stage(node=first, first=0, last=2), Stage(node=second, first=3, last=5))


async def ask_whole(serving: Serving) -> Plain:
    """A request that is answered in one piece."""
    request = {"prompt": PROMPT, "max_tokens": WHOLE, "ignore_eos": True}
    return await serving.bus.ask(CHAT, request)


async def under_way(serving: Serving, client: Client) -> tuple[list[Streaming], asyncio.Task[Plain]]:
    """Streams that run or wait, and a request that is not streamed."""
    whole = asyncio.create_task(ask_whole(serving))
    await asyncio.sleep(0)
    await settle(serving.bus.nats)
    streams = await serving.accepted(client, STREAMED)
    await asyncio.gather(*(stream.began() for stream in streams[:3]))
    return streams, whole


async def all_end_right(serving: Serving, streams: list[Streaming], whole: asyncio.Task[Plain], said: Said) -> None:
    for stream, count in zip(streams, STREAMED, strict=True):
        assert await stream.end(ENDS_S) is None
        assert stream.ids == serving.oracle.tokens(PROMPT, count)
        assert [token.index for token in stream.tokens] == list(range(count))
    async with asyncio.timeout(ENDS_S):
        assert tuple((await whole)["token_ids"]) == serving.oracle.tokens(PROMPT, WHOLE)
    assert all(len(tokens) == 1 for tokens in said.tokens.values()), "an index with two tokens"


async def test_what_a_killed_ingress_had_accepted_is_answered_by_a_successor(spared: Serving) -> None:
    async with heard(spared) as (client, said):
        streams, whole = await under_way(spared, client)
        killed = await ingress(spared)
        await spared.cluster.kill(killed)
        await all_end_right(spared, streams, whole, said)
        assert await ingress(spared) != killed
        await spared.cluster.start(killed)


async def test_the_slots_of_a_killed_ingress_are_its_successors(spared: Serving) -> None:
    """n0's sequence has crossed to a plan without n0, where it fills the one slot of its length that there is."""
    placed = await spared.deploy(CHAT, "llama", placement=halves(N0, N1), settings=SETTINGS)
    assert placed.current is not None
    async with heard(spared) as (client, said):
        [stream] = await spared.accepted(client, (1000,))
        await stream.began()
        deploying = asyncio.create_task(spared.deploy(CHAT, "llama", placement=halves(N2, N1), settings=SETTINGS))
        await spared.ear.wait(AuditKind.SEQUENCE_MOVED, epoch=placed.current.epoch + 1)
        await spared.cluster.kill(N0)
        try:
            await deploying
            assert await stream.end(SILENT_S) is None, "before its silence alone would tell that n0 is gone"
            assert stream.ids == spared.oracle.tokens(PROMPT, 1000)
            assert all(len(tokens) == 1 for tokens in said.tokens.values())
            assert stream.tokens[-1].usage is not None
            assert stream.tokens[-1].usage.recovered == "identical"
        finally:
            await spared.cluster.start(N0)


async def test_an_ingress_that_is_stopped_and_started_is_not_missed(spared: Serving) -> None:
    async with heard(spared) as (client, said):
        streams, whole = await under_way(spared, client)
        stopped = await ingress(spared)
        await spared.cluster.stop(stopped)
        await spared.cluster.start(stopped)
        await all_end_right(spared, streams, whole, said)


async def test_an_ingress_that_hung_says_nothing_new_once_it_has_a_successor(spared: Serving) -> None:
    async with heard(spared) as (client, said):
        streams, whole = await under_way(spared, client)
        hung = await ingress(spared)
        await spared.cluster.pause(hung)
        await all_end_right(spared, streams, whole, said)
        said_before = set(said.tokens)
        await spared.cluster.resume(hung)
        async with asyncio.timeout(ENDS_S):
            while any(node.lost for node in (await control.status(spared.cluster.operator)).nodes):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await spared.answers()
        await spared.bus.nats.flush()
        # What was stored before the fence it may still say, and as it was said.
        assert set(said.tokens) == said_before
        assert all(len(tokens) == 1 for tokens in said.tokens.values())


async def test_what_was_asked_of_an_ingress_that_hung_is_answered_all_the_same(spared: Serving) -> None:
    """The server goes on handing it requests, which it finds when it wakes, and its successor has none of."""
    async with heard(spared) as (client, said):
        hung = await ingress(spared)
        [stream] = await spared.accepted(client, (WHOLE,))
        await stream.began()
        await spared.cluster.pause(hung)
        asked = [Streaming(client, max_tokens=20) for _ in range(ASKED)]
        await stream.end(ENDS_S)  # by another, which the journal says answers for that
        await spared.cluster.resume(hung)
        assert [await one.end(ENDS_S) for one in asked] == [None] * ASKED
        assert {one.ids for one in asked} == {spared.oracle.tokens(PROMPT, 20)}
        assert stream.ids == spared.oracle.tokens(PROMPT, WHOLE)
        assert all(len(tokens) == 1 for tokens in said.tokens.values())

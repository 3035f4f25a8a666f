"""Processes that are killed: every accepted request ends, in output or in one typed error, and service comes back."""

import asyncio
import time

import pytest

from resplit.server import NATS
from schemas.base import NodeId
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    Serving,
    Streaming,
    three_stages,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

ENDS_S = 40.0
OUTAGE_S = 2.0


async def some_streams(chat: Serving) -> list[Streaming]:
    """Two long streams that run, short ones that run or wait; all are accepted."""
    streams = await chat.accepted(chat.client, (1000, 240, *(50,) * 7))
    await streams[0].began()
    return streams


async def all_end(serving: Serving, streams: list[Streaming]) -> None:
    """Each stream ends in time and in the right tokens."""
    started = time.monotonic()
    for stream in streams:
        assert await stream.end(ENDS_S) is None
        assert stream.ids == serving.oracle.tokens(PROMPT, 1000)[: len(stream.ids)]
        assert stream.tokens[-1].finish_reason == "length"
    assert time.monotonic() - started < ENDS_S


@pytest.mark.parametrize("node", [N1, N2])
async def test_requests_wait_for_a_stage_that_nobody_else_may_run_and_go_on_once_it_is_back(
    chat: Serving, node: NodeId
) -> None:
    streams = await some_streams(chat)
    await chat.cluster.kill(node)
    await chat.cluster.start(node)
    await all_end(chat, streams)


async def test_requests_of_an_ingress_that_nobody_else_may_be_wait_for_its_next_life(chat: Serving) -> None:
    streams = await some_streams(chat)
    await chat.cluster.kill(N0)
    await chat.cluster.start(N0)
    await all_end(chat, streams)


@pytest.mark.parametrize("position", [1, 2])
async def test_what_ran_on_a_lost_node_goes_on_over_those_that_are_left(chat: Serving, position: int) -> None:
    placed = await chat.deploy(CHAT, "llama", stages=3, settings=SETTINGS)
    assert placed.current is not None
    lost = NodeId(placed.current.routes[0].stages[position].node)
    await chat.deploy(CHAT, "llama", settings=SETTINGS)  # and now as many stages as there are nodes for
    streams = await some_streams(chat)
    await chat.cluster.kill(lost)
    await all_end(chat, streams)
    await chat.cluster.start(lost)


async def test_fast_recovery_is_said_and_identical_recovery_too(chat: Serving) -> None:
    """Either way no index is missing, and the beginning is that of an undisturbed run."""
    for recovery, label in (("fast", "equivalent"), ("identical", "identical")):
        settings = SETTINGS.model_copy(update={"recovery": recovery})
        await chat.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=settings)
        [stream] = await chat.accepted(chat.client, (1000,))
        await stream.began()
        await chat.cluster.kill(N1)
        await chat.cluster.start(N1)
        assert await stream.end(ENDS_S) is None
        assert [token.index for token in stream.tokens] == list(range(1000))
        assert stream.ids[:20] == chat.oracle.tokens(PROMPT, 20)
        assert stream.tokens[-1].usage is not None
        assert stream.tokens[-1].usage.recovered == label


async def test_a_killed_server_comes_back_to_agents_that_serve_and_say_again_what_it_swallowed(chat: Serving) -> None:
    streams = await some_streams(chat)
    await chat.cluster.kill(NATS)
    await asyncio.sleep(OUTAGE_S)
    await chat.cluster.start(NATS)
    await all_end(chat, streams)
    await chat.until_answering()
    # And plans are heard: on these nodes in another order.
    await chat.deploy(CHAT, "llama", placement=three_stages(N2, N1, N0), settings=SETTINGS)
    await chat.answers()


async def test_a_killed_orchestrator_is_not_missed_by_requests(chat: Serving) -> None:
    stream = await Streaming(chat.client, max_tokens=200).began()
    await chat.cluster.kill("orchestrator")
    await chat.answers()
    assert await stream.end() is None
    await chat.cluster.start("orchestrator")
    await chat.deploy(CHAT, "llama", placement=three_stages(N1, N0, N2), settings=SETTINGS)
    await chat.answers()
    assert asyncio.get_running_loop().is_running()

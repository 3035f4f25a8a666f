"""Classes of service on real agents: refusal with the estimate, objectives, priorities, and what `status` says."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.store import Store
from resplit import control
from resplit.replies import RequestError
from schemas.control import DeploymentStatus
from schemas.deployment import Settings, Stage
from schemas.slo import Slo
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, Oracle, Plain, Serving, Streaming, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

PLACEMENT = (Stage(node=N0, first=0, last=2), Stage(node=N1, first=3, last=5))
LONG = 440
SETTINGS = Settings(context_tokens=512, max_sequences=4, max_queued=16)
"""Four slots of 128 tokens, one of 512: what needs more than 128 waits for that one."""
HOUR_MS = 3600 * 1000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def classed(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """The decoder over two of three nodes."""
    async with serving(tmp_path_factory.mktemp("classed") / "cluster", zoo_store, oracle) as running:
        await running.deploy(CHAT, "llama", placement=PLACEMENT, settings=SETTINGS)
        yield running
        running.alive()


async def seen(running: Serving) -> DeploymentStatus:
    [found] = [one for one in (await control.status(running.cluster.operator)).deployments if one.name == CHAT]
    return found


async def test_a_deadline_is_refused_on_no_guess_and_once_measured_with_the_estimate(classed: Serving) -> None:
    asked: Plain = {"max_tokens": LONG, "ignore_eos": True}
    with pytest.raises(RequestError) as unmeasured:
        await classed.client.complete(CHAT, PROMPT, deadline_ms=20, **asked)
    assert unmeasured.value.code == "deadline_exceeded", "nobody knew how long it would take"
    for _ in range(4):
        await classed.client.complete(CHAT, PROMPT, max_tokens=8, ignore_eos=True)
    with pytest.raises(RequestError) as measured:
        await classed.client.complete(CHAT, PROMPT, deadline_ms=20, **asked)
    refusal = measured.value
    assert (refusal.code, refusal.field) == ("deadline_unattainable", "deadline_ms")
    assert refusal.estimate_ms is not None
    assert refusal.estimate_ms > 20
    assert f"{refusal.estimate_ms:.0f} ms" in refusal.message
    answer = await classed.client.complete(CHAT, PROMPT, max_tokens=8, ignore_eos=True, deadline_ms=HOUR_MS // 60)
    assert answer.token_ids == classed.oracle.tokens(PROMPT, 8)


async def test_what_holds_the_slot_counts(classed: Serving) -> None:
    await classed.answers()
    prompt = (classed.oracle.text.encode(PROMPT) * 100)[:300]
    asked: Plain = {"token_ids": prompt, "max_tokens": 2, "ignore_eos": True}
    free = await estimated_ms(classed, asked)
    busy = await long(classed).began()
    assert await estimated_ms(classed, asked) > free
    assert await busy.end(60) is None
    answer = await classed.client.complete(CHAT, deadline_ms=HOUR_MS, **asked)
    assert answer.token_ids == classed.oracle.tokens(prompt, 2)


async def estimated_ms(classed: Serving, asked: Plain) -> float:
    with pytest.raises(RequestError) as caught:
        await classed.client.complete(CHAT, deadline_ms=1, **asked)
    assert caught.value.code == "deadline_unattainable"
    assert caught.value.estimate_ms is not None
    return caught.value.estimate_ms


async def test_nothing_is_refused_for_an_objective(classed: Serving) -> None:
    answer = await classed.client.complete(
        CHAT, PROMPT, max_tokens=4, ignore_eos=True, ttft_ms=0.001, tpot_ms=0.001, priority=-9
    )
    assert answer.token_ids == classed.oracle.tokens(PROMPT, 4)


async def test_of_those_that_wait_the_highest_priority_begins_first(classed: Serving) -> None:
    busy = await long(classed).began()
    order: list[int] = []

    async def ask(priority: int) -> None:
        await Streaming(classed.client, max_tokens=150, priority=priority).end(60)
        order.append(priority)

    asking = []
    for priority in (0, -1, 2, 1):
        asking.append(asyncio.create_task(ask(priority)))
        await asyncio.sleep(0.05)
    assert not order, "all of them wait"
    await asyncio.gather(*asking)
    assert order.index(2) < order.index(0) < order.index(-1)
    assert order.index(1) < order.index(-1)
    assert await busy.end(60) is None
    assert busy.ids == classed.oracle.tokens(PROMPT, LONG)


def long(classed: Serving) -> Streaming:
    return Streaming(classed.client, max_tokens=LONG)


@pytest.mark.slow
async def test_a_class_alone_moves_nothing_breaks_nothing_and_shows_in_status(classed: Serving) -> None:
    before = (await seen(classed)).current
    assert before is not None
    stream = await long(classed).began()
    slo = Slo(ttft_ms=HOUR_MS, priority=1)
    await classed.deploy(CHAT, "llama", placement=PLACEMENT, settings=SETTINGS, slo=slo)
    after = (await seen(classed)).current
    assert after is not None
    assert (after.routes, after.slo, after.family) == (before.routes, slo, before.family)
    assert await stream.end(60) is None
    assert stream.ids == classed.oracle.tokens(PROMPT, LONG)
    last = stream.tokens[-1].usage
    assert last is not None
    assert last.epoch == after.epoch, "it crossed to the plan of the new class"
    await classed.client.complete(CHAT, PROMPT, max_tokens=2)
    with pytest.raises(RequestError):
        await classed.client.complete(CHAT, PROMPT, max_tokens=LONG, ignore_eos=True, deadline_ms=1)
    await classed.client.complete(CHAT, PROMPT, max_tokens=2, ttft_ms=0.001)
    assert N2 not in after.nodes
    # What ends in the first seconds of a plan mostly ran on the one before, and counts for neither.
    async with asyncio.timeout(60):
        while (counted := (await seen(classed)).attainment) is None or counted.met < 3:
            await classed.client.complete(CHAT, PROMPT, max_tokens=2)
            await asyncio.sleep(0.5)
    assert counted.missed == 0, "who asks for the impossible burns nobody's budget"

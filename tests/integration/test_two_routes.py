"""A plan of two routes: any ingress drives either, both are used, and what ran over one goes on over the other."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from bus.identity import ORCHESTRATOR, load_identity
from bus.streams import ensure_streams
from models.store import Store
from orchestrator.log import PlanLog
from orchestrator.rollout import Proceed, Propose, note, step
from resplit.cluster import LocalCluster
from schemas.base import NodeId
from schemas.deployment import Settings, Stage
from schemas.envelope import RECEIPT_TYPE, open_envelope
from schemas.plan import Plan, Receipt, Route
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, Oracle, Serving, Streaming, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTINGS = Settings(context_tokens=192, max_sequences=8, max_queued=32)
"""All slots are of one length."""
PREPARED_S = 60.0
ENDS_S = 100.0
"""A step on a route of which nothing was measured yet is given up after 60 s where no orchestrator says sooner who is
gone (`agent.driver`)."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def twin(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three agents and no orchestrator: what they do, they do by themselves. The decoder runs over two routes."""
    async with serving(tmp_path_factory.mktemp("twin") / "cluster", zoo_store, oracle) as running:
        for node in (N1, N2, N0):  # each has the whole model on its disk then
            whole = (Stage(node=node, first=0, last=5),)
            status = await running.deploy(CHAT, "llama", placement=whole, settings=SETTINGS)
        assert status.current is not None
        await running.until(lambda found: not found.draining)
        await running.cluster.stop(ORCHESTRATOR)
        await roll_out(running.cluster, running, two_routes(status.current))
        yield running


def two_routes(before: Plan) -> Plan:
    """Over n0 and n2, and over n1 alone: each has half of the slots."""
    chains = (((N0, 0, 2), (N2, 3, 5)), ((N1, 0, 5),))
    stages = [tuple(Stage(node=node, first=a, last=b) for node, a, b in chain) for chain in chains]
    routes = tuple(
        Route(index=i, source=chain[0].node, stages=chain, max_sequences=4) for i, chain in enumerate(stages)
    )
    update = {"epoch": before.epoch + 1, "previous": before.digest, "routes": routes, "reason": "two routes"}
    return before.model_copy(update=update)


async def roll_out(cluster: LocalCluster, running: Serving, plan: Plan) -> None:
    """What an orchestrator does to bring a plan into force."""
    identity = load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR)
    heard: asyncio.Queue[Receipt] = asyncio.Queue()

    async def receipt(message: Msg) -> None:
        heard.put_nowait(open_envelope(message.data, Receipt, RECEIPT_TYPE, identity.agents)[0])

    subscription = await running.control.subscribe("resplit.v1.receipt.*", cb=receipt)
    log = PlanLog(await ensure_streams(running.control), identity)
    now = datetime.now(UTC)
    _, rollouts = await log.take_office(NodeId("by-hand"), now, lambda _, error: pytest.fail(str(error)))
    taken = step(rollouts[CHAT], Propose(plan), now)
    async with asyncio.timeout(PREPARED_S):
        while taken is not None:
            rollout, event = taken
            await log.append(event)
            while (taken := step(rollout, Proceed(), now)) is None and not _is_done(rollout.applied, rollout.draining):
                rollout = note(rollout, await heard.get(), now)
    await subscription.unsubscribe()


def _is_done(applied: frozenset[NodeId], draining: tuple[object, ...]) -> bool:
    return applied >= {N0, N1, N2} and not draining


async def test_both_routes_are_used_under_load_and_the_answers_are_those_of_the_unsplit_model(twin: Serving) -> None:
    counts = [24 + i for i in range(24)]
    streams = [Streaming(twin.client, max_tokens=count) for count in counts]
    routes = set()
    for stream, count in zip(streams, counts, strict=True):
        assert await stream.end(ENDS_S) is None
        assert stream.ids == twin.oracle.tokens(PROMPT, count)
        usage = stream.tokens[-1].usage
        assert usage is not None
        routes.add(usage.route)
    assert routes == {0, 1}


@pytest.mark.slow
async def test_what_an_ingress_that_hangs_got_is_answered_by_the_other_and_its_route_is_used_again_after(
    twin: Serving,
) -> None:
    await twin.cluster.pause(N0)
    try:
        streams = [Streaming(twin.client, max_tokens=12) for _ in range(6)]
        for stream in streams:
            assert await stream.end(ENDS_S) is None
            assert stream.ids == twin.oracle.tokens(PROMPT, 12)
    finally:
        await twin.cluster.resume(N0)
    routes: set[int] = set()
    async with asyncio.timeout(ENDS_S):
        while routes != {0, 1}:
            asked = [twin.client.complete(CHAT, PROMPT, max_tokens=24, ignore_eos=True) for _ in range(16)]
            routes = {answer.usage.route for answer in await asyncio.gather(*asked)}


async def test_when_a_route_breaks_its_sequences_go_on_over_the_other_and_no_plan_is_made(twin: Serving) -> None:
    # More than would rather wait for the faster route, however slow the other one was last.
    streams = [Streaming(twin.client, max_tokens=160) for _ in range(16)]
    await asyncio.gather(*(stream.began(ENDS_S) for stream in streams[:8]))
    await twin.cluster.kill(N2)
    epochs, nodes = set(), set()
    for stream in streams:
        assert await stream.end(ENDS_S) is None
        assert stream.ids == twin.oracle.tokens(PROMPT, 160)
        usage = stream.tokens[-1].usage
        assert usage is not None
        assert usage.route == 1
        epochs.add(usage.epoch)
        nodes |= {stage.node for stage in usage.stages}
    assert nodes == {N0, N1, N2}, "some had begun over the route that broke"
    assert len(epochs) == 1

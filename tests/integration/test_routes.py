"""Several routes on real agents: requests over each, a lock on both, and what a lost node costs."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.store import Store
from resplit import control
from schemas.control import DeploymentStatus
from schemas.deployment import Placement, Stage
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, SETTINGS, Oracle, Serving, Streaming, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

PLACE_S = 60.0
REQUESTS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def routed(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three agents of these tests alone."""
    async with serving(tmp_path_factory.mktemp("routed") / "cluster", zoo_store, oracle) as running:
        yield running


async def chat(running: Serving) -> DeploymentStatus:
    reply = await control.status(running.cluster.url)
    return next(found for found in reply.deployments if found.name == CHAT)


async def answered(running: Serving, tokens: int) -> None:
    """As many requests as two ingresses share, each answered like the unsplit model."""
    streams = [Streaming(running.client, max_tokens=tokens) for _ in range(REQUESTS)]
    assert [await stream.end() for stream in streams] == [None] * REQUESTS
    assert {stream.ids for stream in streams} == {running.oracle.tokens(PROMPT, tokens)}


async def test_two_routes_share_a_stage_and_answer_like_the_unsplit_model(routed: Serving) -> None:
    await routed.deploy(CHAT, "llama", routes=2, settings=SETTINGS)
    found = await chat(routed)
    assert found.current is not None
    assert len(found.current.routes) == 2
    assert sum(route.max_sequences for route in found.current.routes) == SETTINGS.max_sequences
    await answered(routed, 24)
    last = found.current.block_count - 1
    shared: Placement = (
        (Stage(node=N0, first=0, last=1), Stage(node=N2, first=2, last=last)),
        (Stage(node=N1, first=0, last=1), Stage(node=N2, first=2, last=last)),
    )
    locked = await control.place_and_wait(routed.cluster.url, CHAT, shared, PLACE_S)
    assert locked.current is not None
    assert locked.current.chains == shared
    await answered(routed, 24)
    await control.place_and_wait(routed.cluster.url, CHAT, None, PLACE_S)


async def test_a_lost_node_costs_its_own_route_alone(routed: Serving) -> None:
    await routed.deploy(CHAT, "llama", routes=2, settings=SETTINGS)
    found = await chat(routed)
    assert found.current is not None
    stays, lost = found.current.routes[0].stages, found.current.routes[1].source
    assert lost not in {stage.node for stage in stays}
    streams = [await Streaming(routed.client, max_tokens=200).began() for _ in range(2)]
    await routed.cluster.kill(lost)
    assert [await stream.end() for stream in streams] == [None] * 2
    assert {stream.ids for stream in streams} == {routed.oracle.tokens(PROMPT, 200)}
    await routed.until_answering()
    after = await chat(routed)
    assert after.current is not None
    assert stays in after.current.chains
    assert lost not in after.current.nodes
    await answered(routed, 24)
    await routed.cluster.start(lost)

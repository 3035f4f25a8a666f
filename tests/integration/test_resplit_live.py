"""A deployment is cut anew while it streams: nobody notices but the audit trail. And several routes: requests over
each, a lock on both, and what a lost node costs."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.store import Store
from resplit import control
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.control import DeploymentStatus
from schemas.deployment import Placement, Stage
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    SLOTS,
    Oracle,
    Serving,
    Streaming,
    serving,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = 400
PLACE_S = 60.0
REQUESTS = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def moving(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    async with serving(tmp_path_factory.mktemp("moving") / "cluster", zoo_store, oracle) as running:
        yield running


def placed(*cuts: tuple[NodeId, int, int]) -> tuple[Stage, ...]:
    return tuple(Stage(node=node, first=first, last=last) for node, first, last in cuts)


HALVES = placed((N0, 0, 2), (N1, 3, 5))
UNEVEN = placed((N0, 0, 1), (N1, 2, 5))
THREE = placed((N0, 0, 1), (N2, 2, 3), (N1, 4, 5))
REVERSED = placed((N1, 0, 2), (N0, 3, 5))
U_SHAPE = placed((N2, 0, 0), (N1, 1, 4), (N2, 5, 5))


async def test_streams_cross_every_cut_without_a_wrong_token(moving: Serving) -> None:
    await moving.deploy(CHAT, "llama", placement=HALVES, settings=SETTINGS)
    streams = [Streaming(moving.client, max_tokens=TOKENS) for _ in range(SLOTS)]
    await streams[0].began()
    for placement in (UNEVEN, THREE, REVERSED, U_SHAPE, HALVES):
        await moving.deploy(CHAT, "llama", placement=placement, settings=SETTINGS)
        await asyncio.sleep(0.2)
    for stream in streams:
        assert await stream.end() is None
        assert stream.ids == moving.oracle.tokens(PROMPT, TOKENS)
    await moving.ear.wait(AuditKind.SEQUENCE_MOVED)
    moved = [event for event in moving.ear.heard if event.kind is AuditKind.SEQUENCE_MOVED]
    assert len({event.epoch for event in moved}) >= 2, "they crossed more than one cut"
    refused = [event for event in moving.ear.heard if event.kind is AuditKind.REQUEST_REFUSED]
    assert refused == []


async def test_a_request_keeps_its_answer_while_its_ingress_leaves_the_plan(moving: Serving) -> None:
    await moving.deploy(CHAT, "llama", placement=HALVES, settings=SETTINGS)
    stream = await Streaming(moving.client, max_tokens=700).began()
    await moving.deploy(CHAT, "llama", placement=placed((N1, 0, 2), (N2, 3, 5)), settings=SETTINGS)
    assert await stream.end() is None
    assert stream.ids == moving.oracle.tokens(PROMPT, 700)
    assert stream.tokens[-1].usage is not None
    ran_on = [stage.node for stage in stream.tokens[-1].usage.stages]
    assert len(set(ran_on)) == 3
    await moving.until(lambda d: d.state == "serving" and not d.draining)


async def test_other_settings_are_no_reason_to_lose_a_request(moving: Serving) -> None:
    await moving.deploy(CHAT, "llama", placement=HALVES, settings=SETTINGS)
    stream = await Streaming(moving.client, max_tokens=200).began()
    other = SETTINGS.model_copy(update={"max_sequences": 2})
    await moving.deploy(CHAT, "llama", placement=REVERSED, settings=other)
    assert await stream.end() is None
    assert stream.ids == moving.oracle.tokens(PROMPT, 200)
    assert list(itertools.islice(stream.ids, 3))


async def chat(running: Serving) -> DeploymentStatus:
    reply = await control.status(running.cluster.operator)
    return next(found for found in reply.deployments if found.name == CHAT)


async def answered(running: Serving, tokens: int) -> None:
    """As many requests as two ingresses share, each answered like the unsplit model."""
    streams = [Streaming(running.client, max_tokens=tokens) for _ in range(REQUESTS)]
    assert [await stream.end() for stream in streams] == [None] * REQUESTS
    assert {stream.ids for stream in streams} == {running.oracle.tokens(PROMPT, tokens)}


async def test_two_routes_share_a_stage_and_answer_like_the_unsplit_model(moving: Serving) -> None:
    await moving.deploy(CHAT, "llama", routes=2, settings=SETTINGS)
    found = await chat(moving)
    assert found.current is not None
    assert len(found.current.routes) == 2
    assert sum(route.max_sequences for route in found.current.routes) == SETTINGS.max_sequences
    await answered(moving, 24)
    last = found.current.block_count - 1
    shared: Placement = (
        (Stage(node=N0, first=0, last=1), Stage(node=N2, first=2, last=last)),
        (Stage(node=N1, first=0, last=1), Stage(node=N2, first=2, last=last)),
    )
    locked = await control.place_and_wait(moving.cluster.operator, CHAT, shared, PLACE_S)
    assert locked.current is not None
    assert locked.current.chains == shared
    await answered(moving, 24)
    await control.place_and_wait(moving.cluster.operator, CHAT, None, PLACE_S)


async def test_a_lost_node_costs_its_own_route_alone(moving: Serving) -> None:
    await moving.deploy(CHAT, "llama", routes=2, settings=SETTINGS)
    found = await chat(moving)
    assert found.current is not None
    stays, lost = found.current.routes[0].stages, found.current.routes[1].source
    assert lost not in {stage.node for stage in stays}
    streams = [await Streaming(moving.client, max_tokens=200).began() for _ in range(2)]
    await moving.cluster.kill(lost)
    assert [await stream.end() for stream in streams] == [None] * 2
    assert {stream.ids for stream in streams} == {moving.oracle.tokens(PROMPT, 200)}
    await moving.until_answering()
    after = await chat(moving)
    assert after.current is not None
    event = await moving.ear.wait(AuditKind.PLAN_PREPARED, deployment=CHAT, epoch=after.current.epoch)
    if event.fields["cause"] == "node_lost":  # else what the trigger found since then is in force
        assert stays in after.current.chains
    assert lost not in after.current.nodes
    await answered(moving, 24)
    await moving.cluster.start(lost)

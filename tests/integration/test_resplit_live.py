"""A deployment is cut anew while it streams: nobody notices but the audit trail."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.store import Store
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.deployment import Stage
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

TOKENS = 600


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
    assert {event.epoch for event in moved} >= {2, 3}
    refused = [event for event in moving.ear.heard if event.kind is AuditKind.REQUEST_REFUSED]
    assert refused == []


async def test_a_request_keeps_its_answer_while_its_ingress_leaves_the_plan(moving: Serving) -> None:
    await moving.deploy(CHAT, "llama", placement=HALVES, settings=SETTINGS)
    stream = await Streaming(moving.client, max_tokens=TOKENS).began()
    await moving.deploy(CHAT, "llama", placement=placed((N1, 0, 2), (N2, 3, 5)), settings=SETTINGS)
    assert await stream.end() is None
    assert stream.ids == moving.oracle.tokens(PROMPT, TOKENS)
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

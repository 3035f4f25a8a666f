"""Agents from whom plans are withheld, and agents whom nobody leads: they say so, and serve on."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from agent.guidance import TICK_MAX_S, UNGUIDED_AFTER_S
from bus.identity import ORCHESTRATOR
from bus.permissions import edge_api
from models.store import Store
from resplit import control
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.beacon import BEACON_EVERY_S
from schemas.capacity import Guidance
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    SETTINGS,
    Oracle,
    Serving,
    command,
    serving,
    three_stages,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

OTHER = DeploymentName("other")
SOON_S = 40.0
ENVELOPE_BYTES_MAX = 1500
"""Of one deployment and its roster: what is said every two seconds."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def led(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three agents that serve the decoder."""
    async with serving(tmp_path_factory.mktemp("led") / "cluster", zoo_store, oracle) as running:
        await running.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        yield running
        running.alive()


async def guided(running: Serving, node: str, wanted: Guidance | None) -> None:
    """Wait until this is what the orchestrator knows of a node's guidance."""
    async with asyncio.timeout(SOON_S):
        while True:
            seen = await control.status(running.cluster.operator)
            if [found.capacity.guidance for found in seen.nodes if found.capacity.node == node] == [wanted]:
                return
            await asyncio.sleep(0.2)


async def test_a_plan_that_is_withheld_from_one_agent_is_said_by_that_agent(led: Serving) -> None:
    """The server's owner takes two lines out of the agent's permissions: it hears plans neither live nor in the log."""
    led.ear.heard.clear()
    await led.cluster.deny(N1, subjects.ALL_PLANS, edge_api("STREAM.MSG.GET", subjects.STREAM_PLANS))
    await led.deploy(OTHER, "llama", placement=three_stages(N0, N2, N0), settings=SETTINGS)
    event = await led.ear.wait(AuditKind.EVENT_WITHHELD, SOON_S, source=N1)
    assert event.deployment == OTHER
    await guided(led, N1, Guidance(withheld=(OTHER,)))
    for node in (N0, N2):
        await guided(led, node, None)
    code, shown, _ = await command("status", "--url", led.cluster.url, "--keys", str(led.cluster.operator_keys))
    assert code == 0 and f"withheld: {OTHER}" in " ".join(shown.split())
    await led.answers()
    await led.cluster.deny(N1)
    await guided(led, N1, None)
    said = [found.fields["revision"] for found in led.ear.heard if found.kind is AuditKind.EVENT_WITHHELD]
    assert len(said) == len(set(said)), "each event once"


async def test_agents_whom_nobody_leads_say_so_and_serve_on_and_say_when_somebody_does(led: Serving) -> None:
    led.ear.heard.clear()
    await led.cluster.pause(ORCHESTRATOR)
    try:
        for node in (N0, N1, N2):
            event = await led.ear.wait(AuditKind.NODE_UNGUIDED, SOON_S, source=node)
            silent_s = event.fields["silent_s"]
            assert isinstance(silent_s, float) and UNGUIDED_AFTER_S <= silent_s < UNGUIDED_AFTER_S + TICK_MAX_S
        await led.answers()
    finally:
        await led.cluster.resume(ORCHESTRATOR)
    for node in (N0, N1, N2):
        await led.ear.wait(AuditKind.NODE_GUIDED, SOON_S, source=node)
        await guided(led, node, None)
    said = [found.source for found in led.ear.heard if found.kind is AuditKind.NODE_UNGUIDED]
    assert sorted(said) == [N0, N1, N2], "and each once"
    await led.answers()


@pytest.mark.slow
async def test_an_agent_that_starts_again_is_guided_within_seconds(led: Serving) -> None:
    led.ear.heard.clear()
    await led.cluster.kill(N2)
    await led.cluster.start(N2)
    await led.until_answering()
    await asyncio.sleep(UNGUIDED_AFTER_S)
    await guided(led, N2, None)
    assert not [found for found in led.ear.heard if found.kind is AuditKind.NODE_UNGUIDED]


@pytest.mark.slow
async def test_a_beacon_is_one_small_message_every_two_seconds(led: Serving) -> None:
    sizes: list[int] = []

    async def note(message: Msg) -> None:
        sizes.append(len(message.data))

    subscription = await led.edge.subscribe(subjects.BEACON, cb=note)
    await asyncio.sleep(4 * BEACON_EVERY_S)
    await subscription.unsubscribe()
    assert 3 <= len(sizes) <= 5
    assert max(sizes) <= ENVELOPE_BYTES_MAX

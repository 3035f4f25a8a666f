"""Deployments on demand on real processes: more models than there is memory for, and every request answered."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from models.store import Store
from profiler.memory import memory_bytes
from resplit import control
from resplit.replies import RequestError
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.control import DeploymentStatus
from schemas.deployment import Settings
from tests.integration.cluster_fixtures import PROMPT, Oracle, Serving, command, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTINGS = Settings(context_tokens=1024, max_sequences=1024, max_queued=64)
"""Caches for so many sequences are what takes the memory, 215 MB."""
BARE_BYTES = 160_000_000
"""What an agent takes with nothing loaded, and some room to spare."""
ONE, TWO, THREE = (DeploymentName(name) for name in ("one", "two", "three"))
COUNT = 6


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowded(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three deployments on demand, over two nodes of which both together have room for one."""
    need = sum(memory_bytes(block, SETTINGS) for block in zoo_store.manifest("llama").blocks)
    folder = tmp_path_factory.mktemp("crowded")
    async with serving(folder, zoo_store, oracle, 2, memory_bytes=BARE_BYTES + round(0.7 * need)) as found:
        for name in (ONE, TWO, THREE):
            await found.deploy(name, "llama", settings=SETTINGS, on_demand=True)
        yield found


async def states(crowded: Serving) -> dict[str, str]:
    return {one.name: one.state for one in (await control.status(crowded.cluster.operator)).deployments}


async def test_what_is_cold_is_loaded_for_the_request_that_asks_for_it(crowded: Serving) -> None:
    assert sorted((await states(crowded)).values()) == ["cold", "cold", "serving"]
    for name in (ONE, TWO, THREE, ONE):
        answer = await crowded.client.complete(name, PROMPT, max_tokens=COUNT, ignore_eos=True)
        assert answer.token_ids == crowded.oracle.tokens(PROMPT, COUNT)
        assert (await states(crowded))[name] in ("changing", "serving")
    made_room = [
        event
        for event in crowded.ear.heard
        if event.kind is AuditKind.PLAN_PREPARED and event.fields.get("cause") == "makes_room"
    ]
    assert len(made_room) >= 3


async def test_all_that_are_asked_at_once_are_answered_and_no_sequence_is_disturbed(crowded: Serving) -> None:
    asked = [
        crowded.client.complete(name, PROMPT, max_tokens=COUNT * number, ignore_eos=True)
        for number in (1, 4)
        for name in (ONE, TWO, THREE)
    ]
    for number, answer in enumerate(await asyncio.gather(*asked)):
        assert answer.token_ids == crowded.oracle.tokens(PROMPT, COUNT * (1 if number < 3 else 4))
        assert answer.usage.recovered is None, "nothing was computed anew"


async def cold_one(crowded: Serving) -> DeploymentStatus:
    """One that is cold, and has been loaded before."""
    await crowded.until(lambda found: found.state == "cold" and found.current is not None, TWO, 30)
    seen = await control.status(crowded.cluster.operator)
    return next(one for one in seen.deployments if one.state == "cold" and one.current and one.current.loads_s)


async def test_a_client_is_told_how_long_loading_takes_and_a_deadline_before_that_is_refused(crowded: Serving) -> None:
    await crowded.client.complete(ONE, PROMPT, max_tokens=1)
    found = await cold_one(crowded)
    assert found.current is not None and found.current.loads_s is not None
    loads_ms = 1e3 * found.current.loads_s
    with pytest.raises(RequestError) as caught:
        await crowded.client.complete(found.name, PROMPT, max_tokens=1, deadline_ms=round(loads_ms / 2))
    assert caught.value.code == "deadline_unattainable"
    assert caught.value.estimate_ms == pytest.approx(loads_ms, abs=1.0)
    replies = await crowded.bus.replies(found.name, {"prompt": PROMPT, "max_tokens": 2, "stream": True})
    assert replies[0]["status"] == "accepted"
    assert replies[0]["loads_s"] == pytest.approx(found.current.loads_s)


async def test_the_command_says_what_is_cold_and_room_is_made_for_what_always_serves(crowded: Serving) -> None:
    at = ["--url", crowded.cluster.url, "--keys", str(crowded.cluster.operator_keys)]
    again = ["--context", "1024", "--sequences", "1024", "--queue", "64"]
    code, said, error = await command("deploy", "llama", "--name", "four", "--on-demand", *again, *at)
    assert code == 0, error
    assert "is cold" in said
    code, said, _ = await command("status", *at)
    assert "cold" in said
    code, said, _ = await command("models", "where", "llama", *at)
    assert code == 0
    assert "serves" in said and "memory" in said and "disk" in said
    assert (await command("models", "where", "none", *at))[0] != 0
    code, said, error = await command("deploy", "llama", "--name", "five", *again, *at)
    assert code == 0, error
    assert "serving" in said
    code, _, error = await command("deploy", "llama", "--name", "six", *again, *at)
    assert code != 0
    assert "short" in error
    for name in ("four", "five"):
        assert (await command("remove", name, *at))[0] == 0
    crowded.alive()


async def test_an_ingress_that_dies_loses_nothing_that_waits_for_its_model(crowded: Serving) -> None:
    await crowded.client.complete(ONE, PROMPT, max_tokens=1)
    found = await cold_one(crowded)
    assert found.current is not None
    asked = asyncio.create_task(crowded.client.complete(found.name, PROMPT, max_tokens=COUNT, ignore_eos=True))
    await asyncio.sleep(0.2)
    door = found.current.routes[0].source
    await crowded.cluster.kill(door)
    await crowded.cluster.start(door)
    assert (await asked).token_ids == crowded.oracle.tokens(PROMPT, COUNT)


async def test_a_deployment_that_is_removed_while_it_is_cold_is_gone(crowded: Serving, tmp_path: Path) -> None:
    found = await cold_one(crowded)
    at = ["--url", crowded.cluster.url, "--keys", str(crowded.cluster.operator_keys)]
    assert (await command("remove", found.name, *at))[0] == 0
    async with asyncio.timeout(10):
        while found.name in await states(crowded):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

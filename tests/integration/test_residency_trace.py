"""Six models on a third of their memory, on real agents, while their popularity drifts."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from models.importer import import_model
from models.reference import Reference
from models.store import Store
from profiler.memory import memory_bytes
from resplit import control
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.deployment import Settings
from schemas.errors import ResplitError
from tests import model_zoo
from tests.integration.cluster_fixtures import Oracle, Serving, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTINGS = Settings(context_tokens=1024, max_sequences=1024)
"""Caches for so many sequences are what takes the memory."""
BARE_BYTES = 160_000_000
MODELS = tuple(f"{family}-{precision}" for family in model_zoo.DECODERS for precision in ("fp32", "int4"))
REQUESTS, PER_S, DRIFT = 48, 4.0, 12
TOKENS = 5
PROMPT = (7, 11, 13)


@dataclass
class Six:
    """The cluster, and what each model says uncut."""

    serving: Serving
    said: dict[str, tuple[int, ...]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def six(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> AsyncIterator[Six]:
    folder = tmp_path_factory.mktemp("six")
    store = Store(folder / "store")
    for name in MODELS:
        family, precision = name.split("-")
        import_model(str(model_zoo.built_folder(folder, family, precision)), store, name)
    said = {
        name: tuple(
            Reference(store, name).generate(list(PROMPT), TOKENS, SETTINGS.chunk_tokens, 1024, stop_at_eos=False)
        )
        for name in MODELS
    }
    need = sum(sum(memory_bytes(block, SETTINGS) for block in store.manifest(name).blocks) for name in MODELS)
    async with serving(folder / "cluster", store, oracle, 3, memory_bytes=BARE_BYTES + need // 9) as running:
        for name in MODELS:
            await running.deploy(name, name, settings=SETTINGS, on_demand=True)
        yield Six(running, said)


def trace(seed: int) -> list[str]:
    """Whom each request is for: the first of an order is asked for half of the time, and the order goes round."""
    draw, order, found = random.Random(seed), list(MODELS), list[str]()
    for number in range(REQUESTS):
        if number % DRIFT == DRIFT - 1:
            order.append(order.pop(0))
        found.append(draw.choices(order, [2.0**-rank for rank in range(len(order))])[0])
    return found


async def test_a_drifting_trace_over_six_models_is_answered_and_no_block_in_use_is_evicted(six: Six) -> None:
    states = Counter(one.state for one in (await control.status(six.serving.cluster.operator)).deployments)
    assert states["cold"] >= 3, "there is not nearly room for all"
    draw = random.Random(1)

    async def ask(name: str, after_s: float) -> float:
        await asyncio.sleep(after_s)
        answer = await six.serving.client.complete(name, token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert answer.token_ids == six.said[name]
        assert answer.usage.recovered is None, "its blocks were taken away while it ran"
        return answer.usage.queued_ms

    at_s, asked = 0.0, []
    for name in trace(1):
        at_s += draw.expovariate(PER_S)
        asked.append(ask(name, at_s))
    waited = await asyncio.gather(*asked)
    assert any(ms < 100.0 for ms in waited), "some model was there"
    assert any(ms > 100.0 for ms in waited), "some model was not"
    causes = Counter(e.fields.get("cause") for e in six.serving.ear.heard if e.kind is AuditKind.PLAN_PREPARED)
    assert causes["asked_for"] and causes["makes_room"]
    six.serving.alive()


async def test_room_is_made_for_a_model_that_always_serves_until_there_is_none_left(six: Six) -> None:
    answered = set()
    with pytest.raises(ResplitError, match="short"):
        for number, name in enumerate(MODELS):
            always = f"always-{number}"
            await six.serving.deploy(always, name, settings=SETTINGS)
            answer = await six.serving.client.complete(always, token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
            assert answer.token_ids == six.said[name]
            answered.add(always)
    seen = {one.name: one.state for one in (await control.status(six.serving.cluster.operator)).deployments}
    assert 1 <= len(answered) < len(MODELS)
    assert {name for name, state in seen.items() if name.startswith("always")} == answered
    assert all(seen[DeploymentName(name)] in ("cold", "serving", "changing", "preparing") for name in MODELS)

"""Small disks on real agents: what a plan needs comes first, what is worth more lies there, and no more than may."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from models.importer import import_model
from models.reference import Reference
from models.store import Store
from profiler.memory import memory_bytes
from schemas.audit import AuditKind
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from tests import model_zoo
from tests.integration.cluster_fixtures import N0, Oracle, Serving, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTINGS = Settings(context_tokens=1024, max_sequences=1024, max_queued=64)
BARE_BYTES = 160_000_000
OFTEN, SELDOM, LARGE = "qwen2-fp32", "llama-fp32", "qwen3-fp32"
PROMPT = (7, 11, 13)
TOKENS = 5


@dataclass
class Cramped:
    """One agent whose disk has room for one and a half of the models, and its memory for one."""

    serving: Serving
    store: Store
    said: dict[str, tuple[int, ...]]
    limit_bytes: int

    async def ask(self, name: str) -> None:
        answer = await self.serving.client.complete(name, token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert answer.token_ids == self.said[name]
        assert self.taken_bytes <= self.limit_bytes

    @property
    def taken_bytes(self) -> int:
        blobs = Store(self.serving.cluster.folder / N0 / "store").blobs_folder
        return sum(path.stat().st_size for path in blobs.iterdir())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cramped(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> AsyncIterator[Cramped]:
    folder = tmp_path_factory.mktemp("cramped")
    store = Store(folder / "store")
    for name in (OFTEN, SELDOM):
        family, precision = name.split("-")
        import_model(str(model_zoo.built_folder(folder, family, precision)), store, name)
    large = model_zoo.decoder_folder(folder, "qwen3", layers=24)
    import_model(str(large), store, LARGE)
    said = {
        name: tuple(Reference(store, name).generate(list(PROMPT), TOKENS, 128, 1024, stop_at_eos=False))
        for name in (OFTEN, SELDOM)
    }
    limit = round(1.5 * max(store.manifest(name).stored_bytes for name in (OFTEN, SELDOM)))
    assert store.manifest(LARGE).stored_bytes > 1.2 * limit
    need = max(sum(memory_bytes(b, SETTINGS) for b in store.manifest(name).blocks) for name in (OFTEN, SELDOM))
    memory = BARE_BYTES + round(1.4 * need)
    async with serving(folder / "cluster", store, oracle, 1, memory_bytes=memory, disk_bytes=limit) as running:
        for name in (OFTEN, SELDOM):
            await running.deploy(name, name, settings=SETTINGS, on_demand=True)
        yield Cramped(running, store, said, limit)


@pytest.mark.slow
async def test_what_a_plan_needs_comes_in_the_place_of_what_nobody_runs(cramped: Cramped) -> None:
    for name in (SELDOM, OFTEN, SELDOM, OFTEN):
        await cramped.ask(name)
    swept = [event for event in cramped.serving.ear.heard if event.kind is AuditKind.BLOCKS_SWEPT]
    assert len(swept) >= 2
    for name in (OFTEN, SELDOM):
        await asyncio.gather(*(cramped.ask(name) for _ in range(3)))


@pytest.mark.slow
async def test_a_model_that_is_larger_than_the_disk_is_refused_in_bytes(cramped: Cramped) -> None:
    small = Settings(context_tokens=64, max_sequences=1)
    with pytest.raises(ResplitError) as caught:
        await cramped.serving.deploy("large", LARGE, settings=small)
    assert caught.value.code is ErrorCode.MODEL_TOO_LARGE
    assert "disk" in caught.value.message and "short" in caught.value.message
    await cramped.ask(OFTEN)

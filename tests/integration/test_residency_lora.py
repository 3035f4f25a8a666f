"""Variants of one base on real agents: what they share is loaded once, and each says what it says uncut."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from models.importer import import_model
from models.lora import import_variant
from models.reference import Reference
from models.sealer import seal_model
from models.store import Store
from profiler.memory import memory_bytes, session_memory_bytes
from resplit import control
from schemas.audit import AuditKind
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from tests import model_zoo
from tests.integration.cluster_fixtures import N0, N1, Oracle, Serving, serving
from tests.lora_zoo import adapter_folder

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTINGS = Settings(context_tokens=512, max_sequences=4, max_queued=16)
BARE_BYTES = 160_000_000
HIDDEN, LAYERS = 448, 6
"""Of weights that take more than what a process takes is uncertain by."""
VARIANTS = ("plain", "tutor", "poet")
PROMPT = (7, 11, 13)
TOKENS = 6


@dataclass
class Family:
    """A cluster with three variants of one base in its store, and what each says uncut."""

    serving: Serving
    store: Store
    said: dict[str, tuple[int, ...]]
    base_bytes: int


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def family(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> AsyncIterator[Family]:
    folder = tmp_path_factory.mktemp("family")
    store = Store(folder / "store")
    import_model(str(model_zoo.decoder_folder(folder, "llama", LAYERS, hidden=HIDDEN)), store, "base")
    square = {"q_proj": (HIDDEN, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    import_variant("base", None, store, "plain")
    for seed, name in enumerate(("tutor", "poet")):
        adapter = adapter_folder(folder, name, targets=square, layers=range(LAYERS), seed=seed, sizes=square)
        import_variant("base", str(adapter), store, name)
    said = {
        name: tuple(Reference(store, name).generate(list(PROMPT), TOKENS, 128, 512, stop_at_eos=False))
        for name in VARIANTS
    }
    assert len(set(said.values())) == len(VARIANTS), "they are different models"
    blocks = store.manifest("plain").blocks
    whole = sum(memory_bytes(block, SETTINGS) for block in blocks)
    async with serving(folder / "cluster", store, oracle, 2, memory_bytes=BARE_BYTES + round(1.6 * whole)) as running:
        yield Family(running, store, said, sum(map(session_memory_bytes, blocks)))


async def test_three_variants_serve_where_there_is_room_for_their_base_once_and_a_half(family: Family) -> None:
    one_stage = (Stage(node=N0, first=0, last=len(family.store.manifest("plain").blocks) - 1),)
    free = []
    for name in VARIANTS:
        await family.serving.deploy(name, name, settings=SETTINGS, placement=one_stage)
        seen = await control.status(family.serving.cluster.operator)
        free.append(next(n.capacity.memory_free_bytes for n in seen.nodes if n.capacity.node == N0))
    assert free[0] - free[2] < family.base_bytes / 2, "the second and the third took no base of their own"
    for _ in range(2):
        answers = await asyncio.gather(
            *(
                family.serving.client.complete(name, token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
                for name in VARIANTS
            )
        )
        assert {name: answer.token_ids for name, answer in zip(VARIANTS, answers, strict=True)} == family.said
    with pytest.raises(ResplitError) as caught:
        await family.serving.deploy("another", "base", settings=SETTINGS, placement=one_stage)
    assert caught.value.code is ErrorCode.INFEASIBLE, "the base itself has other graphs, and shares no layer"


async def test_a_variant_is_cut_and_moved_like_any_model(family: Family) -> None:
    last = len(family.store.manifest("tutor").blocks) - 1
    cut = (Stage(node=N1, first=0, last=3), Stage(node=N0, first=4, last=last))
    await family.serving.deploy("tutor", "tutor", settings=SETTINGS, placement=cut)
    for name in VARIANTS:
        answer = await family.serving.client.complete(name, token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert answer.token_ids == family.said[name]
    await control.remove(family.serving.cluster.operator, "plain")  # type: ignore[arg-type]
    await family.serving.ear.wait(AuditKind.BLOCKS_FREED, deployment="plain")
    for name in VARIANTS[1:]:
        answer = await family.serving.client.complete(name, token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert answer.token_ids == family.said[name], "the sessions that others share are still there"


async def test_a_sealed_variant_says_the_same(family: Family) -> None:
    seal_model(family.store, "poet", family.store)
    sealed = family.store.manifest("poet")
    assert sealed.is_sealed
    assert any(block.adapter for block in sealed.blocks)
    await family.serving.deploy("secret", "poet", settings=SETTINGS)
    answer = await family.serving.client.complete("secret", token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True)
    assert answer.token_ids == family.said["poet"]

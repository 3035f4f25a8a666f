"""KV length classes and the cost model's terms."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler import cost
from profiler.kv import ALIGNMENT_TOKENS, kv_tokens, length_classes
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime, Capacity, LinkEstimate, Provider
from schemas.deployment import Settings, Stage
from schemas.manifest import BlobRef, Block, KvCache, Manifest, ModelKind, TensorSpec, TextSpec
from schemas.plan import Route

MODEL = Digest("1" * 64)
BLOB = Digest("2" * 64)
EDGE = TensorSpec(name="x", dtype="float32", shape=("batch", "sequence", 256))


@pytest.mark.parametrize(
    ("context", "sequences", "classes"),
    [
        (2048, 32, ((128, 32), (512, 8), (2048, 2))),
        (4096, 1, ((256, 1), (1024, 1), (4096, 1))),
        (300, 6, ((80, 6), (304, 2))),
        (100, 5, ((112, 5),)),
        (2, 3, ((16, 3),)),
    ],
)
def test_length_classes(context: int, sequences: int, classes: tuple[tuple[int, int], ...]) -> None:
    settings = Settings(context_tokens=context, max_sequences=sequences)
    assert length_classes(settings) == classes
    # In memory a class has at least two rows, so that a lone sequence can run in company.
    assert kv_tokens(settings) == sum(tokens * max(2, slots) for tokens, slots in classes)


@given(st.integers(2, 200_000), st.integers(1, 1024))
def test_every_admitted_length_has_a_slot(context: int, sequences: int) -> None:
    classes = length_classes(Settings(context_tokens=context, max_sequences=sequences))
    lengths = [tokens for tokens, _ in classes]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] >= context
    assert all(tokens % ALIGNMENT_TOKENS == 0 and slots >= 1 for tokens, slots in classes)
    assert classes[0][1] == sequences


def decoder() -> Manifest:
    cache = KvCache(
        layout="shared",
        heads=2,
        head_dim=16,
        dtype="float16",
        past_key="pk",
        past_value="pv",
        present_key="nk",
        present_value="nv",
    )

    def block(index: int, weight: int, flops: int, kv: tuple[KvCache, ...]) -> Block:
        return Block(
            index=index,
            role=("embedding", "layer", "head")[index],
            graph=BlobRef(digest=BLOB, size_bytes=0),
            weights=(BlobRef(digest=BLOB, size_bytes=weight),),
            input=EDGE if index else None,
            output=EDGE if index < 2 else None,
            kv=kv,
            flops_per_token=flops,
        )

    return Manifest(
        name="tiny",
        kind=ModelKind.DECODER,
        architecture="llama",
        precision="fp32",
        source="test",
        cut="by hand",
        inputs=(),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", "sequence", 1000)),),
        blocks=(block(0, 10**7, 0, ()), block(1, 10**7, 5 * 10**6, (cache,)), block(2, 2 * 10**7, 10**7, ())),
        whole=BlobRef(digest=BLOB, size_bytes=0),
        text=TextSpec(tokenizer=BlobRef(digest=BLOB, size_bytes=0), vocab_size=1000, context_length=4096),
    )


def capacity(node: str, **fields: object) -> Capacity:
    base: dict[str, object] = {
        "node": node,
        "boot": "b",
        "sequence": 0,
        "issued_at": datetime(2026, 1, 1, tzinfo=UTC),
        "version": "0",
        "provider": Provider(name="cpu", device="d", flops_per_s=1e11, bytes_per_s=1e10),
        "threads": 1,
        "memory_total_bytes": 1 << 30,
        "memory_free_bytes": 1 << 30,
        "disk_free_bytes": 0,
        "load": 0,
    }
    return Capacity.model_validate({**base, **fields})


def test_a_block_that_was_measured_is_not_guessed() -> None:
    measured = BlockTime(model=MODEL, block=1, decode_ms=7, prefill_ms_per_token=3)
    node = capacity("a", block_times=(measured,))
    assert cost.block_time(node, decoder(), MODEL, 1) == measured
    # Decoding streams 10 MB at 10 GB/s: 1 ms. Prefill is bound by 5 MFLOP at 100 GFLOP/s: 0.05 ms a token.
    guessed = cost.block_time(capacity("b"), decoder(), MODEL, 1)
    assert guessed.decode_ms == pytest.approx(1 + cost.OVERHEAD_MS)
    assert guessed.prefill_ms_per_token == pytest.approx(0.05 + cost.OVERHEAD_MS / 128)


def test_an_embedding_reads_a_row_not_its_table() -> None:
    assert cost.block_time(capacity("a"), decoder(), MODEL, 0).decode_ms == pytest.approx(cost.OVERHEAD_MS)


def test_an_estimate_is_the_sum_of_its_terms() -> None:
    links = (LinkEstimate(peer=NodeId("b"), rtt_ms=10, direct=True),)
    nodes = {NodeId("a"): capacity("a", links=links), NodeId("b"): capacity("b")}
    stages = (Stage(node=NodeId("a"), first=0, last=1), Stage(node=NodeId("b"), first=2, last=2))
    route = Route(index=0, source=NodeId("a"), stages=stages, max_sequences=1)
    found = cost.predict(route, nodes, decoder(), MODEL, prompt_tokens=100)
    assert [(h.source, h.target) for h in found.hops] == [("a", "b"), ("b", "a")]
    assert found.hops[0].decode_ms == pytest.approx(5 + 1e3 * 1024 / cost.DEFAULT_LINK_BYTES_PER_S)
    assert found.hops[0].prefill_ms == pytest.approx(5 + 1e5 * 1024 / cost.DEFAULT_LINK_BYTES_PER_S)
    assert found.hops[1].decode_ms == pytest.approx(5, rel=1e-3)
    assert found.stages[0].decode_ms == pytest.approx(1 + 2 * cost.OVERHEAD_MS)
    assert found.stages[1].decode_ms == pytest.approx(2 + cost.OVERHEAD_MS)
    assert found.bottleneck_ms == found.stages[1].decode_ms
    assert found.tpot_ms == pytest.approx(3 + 3 * cost.OVERHEAD_MS + 10, rel=1e-2)
    assert found.terms["compute_ms"] + found.terms["network_ms"] == pytest.approx(found.terms["tpot_ms"], abs=2e-3)
    assert not found.stages[0].measured


def test_memory_counts_weights_and_every_slot_of_the_cache() -> None:
    block = decoder().blocks[1]
    settings = Settings(context_tokens=2048, max_sequences=32)
    assert cost.kv_memory_bytes(block, settings) == 2 * 2 * 16 * 2 * (128 * 32 + 512 * 8 + 2048 * 2)
    assert cost.memory_bytes(block, settings) == cost.weight_memory_bytes(block) + cost.kv_memory_bytes(block, settings)
    assert cost.weight_memory_bytes(block) > 10**7

"""PURE: the model of a scenario as the manifest that the code in production reads, and the truth about its blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

from profiler.compute import OVERHEAD_MS
from schemas.base import Digest, NodeId
from schemas.capacity import REFERENCE_CONTEXT_TOKENS, BlockTime, Provider
from schemas.manifest import BlobRef, Block, KvCache, Manifest, ModelKind, TensorSpec, TextSpec
from simulator.scenario import ModelSpec, NodeSpec

GRAPH_BYTES = 1
FRAME_S = 0.0002
"""What a frame costs a node beside its computation: between threads, and to encode."""


@dataclass(frozen=True)
class Physics:
    """The model, and what is true of running it, whatever anybody measures."""

    manifest: Manifest
    digest: Digest
    time_of: Callable[[NodeId, NodeSpec, int], BlockTime]
    """What a block takes on an undisturbed machine."""
    frame_s: float = FRAME_S


def physics_of(spec: ModelSpec) -> Physics:
    """By the scenario's own figures."""
    return Physics(manifest_of(spec), model_digest(spec), lambda _, node, block: true_time(spec, node, block))


def _ref(name: str, size: int) -> BlobRef:
    return BlobRef(digest=Digest(sha256(name.encode()).hexdigest()), size_bytes=size)


def model_digest(spec: ModelSpec) -> Digest:
    return Digest(sha256(spec.model_dump_json().encode()).hexdigest())


@cache
def manifest_of(spec: ModelSpec) -> Manifest:
    """An embedding, the layers, a head."""
    dtype = "float16" if spec.element_bytes <= 2 else "float32"
    edge = TensorSpec(name="x", dtype=dtype, shape=("batch", "sequence", spec.hidden))
    last = spec.blocks - 1
    heads, per_head = 1, max(1, spec.layer_kv_bytes // 4)
    kv = KvCache(
        layout="shared", heads=heads, head_dim=per_head, dtype="float16",
        past_key="pk", past_value="pv", present_key="k", present_value="v",
    )  # fmt: skip

    def block(index: int) -> Block:
        role = "embedding" if index == 0 else "head" if index == last else "layer"
        size = spec.layer_bytes if role == "layer" else spec.ends_bytes
        flops = {"embedding": 0, "layer": spec.layer_flops, "head": spec.head_flops}[role]
        return Block(
            index=index,
            role=role,
            graph=_ref(f"{spec.name} graph {index}", GRAPH_BYTES),
            weights=(_ref(f"{spec.name} weights {index}", size),) if size else (),
            input=edge if index else None,
            output=edge if index < last else None,
            kv=(kv,) if role == "layer" and spec.layer_kv_bytes else (),
            flops_per_token=flops,
        )

    return Manifest(
        name=spec.name,
        kind=ModelKind.DECODER,
        architecture="simulated",
        precision="int4",
        source="scenario",
        cut="at every layer",
        inputs=(),
        outputs=(),
        blocks=tuple(block(i) for i in range(spec.blocks)),
        whole=_ref(f"{spec.name} whole", 0),
        text=TextSpec(tokenizer=_ref("tokenizer", 0), vocab_size=2, context_length=spec.context_tokens),
    )


@cache
def true_time(model: ModelSpec, node: NodeSpec, block: int) -> BlockTime:
    """What a block takes on an undisturbed machine of a kind: a roofline, and what its cache adds (mathematics.md A1).

    A step reads the weights once, whoever shares it, and each sequence's cache; a chunk computes.
    """
    what = manifest_of(model).blocks[block]
    compute_ms = 1e3 * what.flops_per_token / node.flops_per_s
    stream_ms = 1e3 * what.weight_bytes / node.bytes_per_s if what.flops_per_token else 0.0
    context_ms = 1e3 * what.kv_bytes_per_token / node.bytes_per_s
    return BlockTime(
        model=model_digest(model),
        block=block,
        decode_ms=max(compute_ms, stream_ms) + OVERHEAD_MS + context_ms * REFERENCE_CONTEXT_TOKENS,
        decode_ms_per_row=compute_ms + context_ms * REFERENCE_CONTEXT_TOKENS,
        decode_ms_per_context_token=context_ms,
        prefill_ms=stream_ms + OVERHEAD_MS,
        prefill_ms_per_token=compute_ms,
    )


@cache
def provider_of(node: NodeSpec) -> Provider:
    """What a machine of a kind says of itself."""
    return Provider(name="cpu", device="simulated", flops_per_s=node.flops_per_s, bytes_per_s=node.bytes_per_s)


def scaled(time: BlockTime, factor: float) -> BlockTime:
    """The time of a block on a machine that takes `factor` times as long."""
    if factor == 1.0:
        return time
    slope = time.decode_ms_per_row
    return time.model_copy(
        update={
            "decode_ms": time.decode_ms * factor,
            "decode_ms_per_row": None if slope is None else slope * factor,
            "decode_ms_per_context_token": time.decode_ms_per_context_token * factor,
            "prefill_ms": time.prefill_ms * factor,
            "prefill_ms_per_token": time.prefill_ms_per_token * factor,
        }
    )

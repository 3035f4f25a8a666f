"""PURE: what a route would cost, term by term (mathematics.md A1). Times in milliseconds.

A block's time is the one its node measured; before there is one, a roofline over the node's calibration. The
network is a fixed latency per hop plus the bytes over the link's rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

from profiler.kv import kv_tokens
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime, Capacity
from schemas.deployment import DEFAULT_CHUNK_TOKENS, Settings
from schemas.manifest import DTYPE_BYTES, Block, Manifest, TensorSpec
from schemas.plan import Route

OVERHEAD_MS = 0.02
"""Per block and call: entering ONNX Runtime and binding its buffers (data-plane-facts.md: 0-8 % of a step)."""
DEFAULT_RTT_MS = 0.5
"""Between two nodes that have not measured each other: a local network."""
DEFAULT_LINK_BYTES_PER_S = 1e9 / 8
"""Gigabit Ethernet, until links are measured for their rate too."""
TOKEN_BYTES = 8
"""What returns from the head to the ingress: one token id."""
RESIDENT_PER_WEIGHT_BYTE = 1.1
"""ONNX Runtime repacks matrices for its kernels and lets go of the originals: measured 1.01 for fp32, and some air."""
SESSION_BYTES = 2 << 20
"""A session's graph, plan and work buffers, per block."""
PROMPT_TOKENS = 128
"""The prompt for which a time to first token is quoted when nobody says another."""


@dataclass(frozen=True)
class StageTerm:
    """Compute of one stage: the whole prompt, and one decode step of one sequence."""

    node: NodeId
    first: int
    last: int
    prefill_ms: float
    decode_ms: float
    measured: bool
    """True if every block of the stage was measured on this node, False if a roofline had to help."""


@dataclass(frozen=True)
class HopTerm:
    """Network from one stage to the next; the last one returns the token to the ingress."""

    source: NodeId
    target: NodeId
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Estimate:
    """Predicted latency of one route, and every term it is the sum of."""

    stages: tuple[StageTerm, ...]
    hops: tuple[HopTerm, ...]

    @property
    def ttft_ms(self) -> float:
        """Time to first token of an unqueued prompt whose chunks follow one another (mathematics.md A1)."""
        return sum(stage.prefill_ms for stage in self.stages) + sum(hop.prefill_ms for hop in self.hops)

    @property
    def tpot_ms(self) -> float:
        """Time per output token of one sequence; for a tensor model, the time of one call."""
        return sum(stage.decode_ms for stage in self.stages) + sum(hop.decode_ms for hop in self.hops)

    @property
    def bottleneck_ms(self) -> float:
        """The busiest stage per step: throughput is at most one step per this time."""
        return max(stage.decode_ms for stage in self.stages)

    @property
    def terms(self) -> dict[str, float]:
        """What an audit event or a status shows of it."""
        return {
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": round(self.tpot_ms, 3),
            "bottleneck_ms": round(self.bottleneck_ms, 3),
            "compute_ms": round(sum(stage.decode_ms for stage in self.stages), 3),
            "network_ms": round(sum(hop.decode_ms for hop in self.hops), 3),
        }


def predict(
    route: Route,
    capacities: Mapping[NodeId, Capacity],
    manifest: Manifest,
    digest: Digest,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Estimate:
    """The latency of one sequence alone on `route`; every node of the route must be in `capacities`."""
    stages = []
    hops = []
    for position, stage in enumerate(route.stages):
        capacity = capacities[stage.node]
        times = [block_time(capacity, manifest, digest, block) for block in stage.blocks]
        prefill_ms = prompt_tokens * sum(time.prefill_ms_per_token for time in times)
        decode_ms = sum(time.decode_ms for time in times)
        measured = all(_measured(capacity, digest, block) is not None for block in stage.blocks)
        stages.append(StageTerm(stage.node, stage.first, stage.last, prefill_ms, decode_ms, measured))
        following = route.stages[position + 1].node if position + 1 < len(route.stages) else route.source
        size = boundary_bytes(manifest, stage.last)
        inner = position + 1 < len(route.stages)
        hops.append(
            HopTerm(
                stage.node,
                following,
                hop_ms(capacities, stage.node, following, size * prompt_tokens if inner else size),
                hop_ms(capacities, stage.node, following, size),
            )
        )
    if route.source != route.stages[0].node:
        sent = [hop_ms(capacities, route.source, route.stages[0].node, TOKEN_BYTES * n) for n in (prompt_tokens, 1)]
        hops.insert(0, HopTerm(route.source, route.stages[0].node, sent[0], sent[1]))
    return Estimate(tuple(stages), tuple(hops))


def block_time(capacity: Capacity, manifest: Manifest, digest: Digest, block: int) -> BlockTime:
    """tP and tD of one block on one node: measured, else `max(FLOP/F, bytes/BW) + overhead` (mathematics.md A1)."""
    measured = _measured(capacity, digest, block)
    if measured is not None:
        return measured
    what = manifest.blocks[block]
    compute_ms = 1e3 * what.flops_per_token / capacity.provider.flops_per_s
    stream_ms = 1e3 * _streamed_bytes(what) / capacity.provider.bytes_per_s
    chunk = DEFAULT_CHUNK_TOKENS
    return BlockTime(
        model=digest,
        block=block,
        decode_ms=max(compute_ms, stream_ms) + OVERHEAD_MS,
        prefill_ms_per_token=max(compute_ms, stream_ms / chunk) + OVERHEAD_MS / chunk,
    )


def hop_ms(capacities: Mapping[NodeId, Capacity], source: NodeId, target: NodeId, size: float) -> float:
    """net(n, n', z) of mathematics.md A1: half the round trip plus the bytes over the rate; 0 on one node."""
    if source == target:
        return 0.0
    return rtt_ms(capacities, source, target) / 2 + 1e3 * size / DEFAULT_LINK_BYTES_PER_S


def rtt_ms(capacities: Mapping[NodeId, Capacity], source: NodeId, target: NodeId) -> float:
    """The slower of what the two nodes measured towards each other, a local network's if neither did."""
    found = [
        link.rtt_ms
        for here, there in ((source, target), (target, source))
        for link in (capacities[here].links if here in capacities else ())
        if link.peer == there
    ]
    return max(found, default=DEFAULT_RTT_MS)


def boundary_bytes(manifest: Manifest, block: int) -> int:
    """a_b: what one token (or one item of a batch) makes cross the boundary after `block`."""
    output = manifest.blocks[block].output
    if output is not None:
        return _item_bytes(output)
    if manifest.text is not None and manifest.text.pooling is None:
        return TOKEN_BYTES
    return sum(_item_bytes(tensor) for tensor in manifest.outputs)


def weight_memory_bytes(block: Block) -> int:
    """What a node must have free to load a block, before any cache."""
    return ceil(block.weight_bytes * RESIDENT_PER_WEIGHT_BYTE) + SESSION_BYTES


def kv_memory_bytes(block: Block, settings: Settings) -> int:
    """What a block's cache takes for all slots of a deployment (`profiler.kv`)."""
    return block.kv_bytes_per_token * kv_tokens(settings)


def memory_bytes(block: Block, settings: Settings) -> int:
    """What a node must have free to host a block of a deployment: W_b + kappa_b * T_max (mathematics.md A1)."""
    return weight_memory_bytes(block) + kv_memory_bytes(block, settings)


def _measured(capacity: Capacity, digest: Digest, block: int) -> BlockTime | None:
    times = (time for time in capacity.block_times if time.model == digest and time.block == block)
    return next(times, None)


def _streamed_bytes(block: Block) -> int:
    # A block without multiplications is a table that is looked up: it reads a row, not the table.
    return block.weight_bytes if block.flops_per_token else 0


def _item_bytes(tensor: TensorSpec) -> int:
    fixed = prod(size for size in tensor.shape if isinstance(size, int) and size > 0)
    return fixed * DTYPE_BYTES[tensor.dtype]

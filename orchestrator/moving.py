"""PURE: what it costs to move a deployment from one plan to another, D(c -> c') of mathematics.md A4.

    T_mig = max_n [missing_bytes_n / B_n + bytes_n / r_disk_n + build_n] + min(KV transfer, recompute, drain)
    D     = price*bytes + slowdown*(T_mig without the second term, unless that is drain)
            + pause*(the second term, unless that is drain) + fixed                 (units: Phi x seconds)

Only blocks that a node does not have loaded count, and of those only what is not on its disk travels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from statistics import harmonic_mean

from profiler.network import DEFAULT_LINK_BYTES_PER_S
from profiler.sizes import sizes_of
from schemas.base import Digest, NodeId
from schemas.capacity import Capacity
from schemas.deployment import Placement
from schemas.manifest import Manifest

DISK_BYTES_PER_S = 500e6
"""A SATA disk's: where a node has not read its own in earnest yet."""
BUILD_BYTES_PER_S = 1e9
"""ONNX Runtime copies and repacks weights about as fast as one core copies memory."""
BUILD_S_PER_BLOCK = 0.05
"""Opening, warming and timing a session."""


@dataclass(frozen=True)
class Prices:
    """What makes bytes, time and trouble comparable with Phi."""

    per_byte: float = 1 / (1 << 30)
    """A GiB over the links costs a second at the reference latency."""
    slowdown: float = 0.1
    """What loading takes from the plan that serves meanwhile: a tenth, since it runs on the same cores and links."""
    pause: float = 1.0
    """A second in which a live sequence stands still costs one at the reference latency."""
    fixed: float = 0.75
    """Every reconfiguration costs this, however little it moves: its risk, and an epoch that drains beside another."""

    def under(self, latency: float) -> "Prices":
        """The same where every plan takes `latency` times the reference latency: a second costs that much more."""
        return replace(self, slowdown=latency * self.slowdown, pause=latency * self.pause, fixed=latency * self.fixed)


@dataclass(frozen=True)
class Live:
    """The sequences that a move would take along."""

    sequences: int = 0
    tokens: float = 0.0
    """In the caches of each, on average."""
    tokens_to_come: float = 0.0
    """That each will still get, on average."""


class Way(StrEnum):
    """How live sequences cross to the new epoch."""

    NONE = "nothing to hand over"
    KV = "KV caches handed over"
    RECOMPUTE = "caches recomputed"
    DRAIN = "sequences finish where they are"


@dataclass(frozen=True)
class Placed:
    """A plan as far as moving to and from it is concerned."""

    chains: Placement
    prefill_ms_per_token: float
    """Of one sequence through every block: what recomputing a cache takes."""
    tpot_ms: float
    shares: tuple[float, ...] = (1.0,)
    """Of the sequences that run on each route."""

    def on(self, node: NodeId) -> frozenset[int]:
        return self.held.get(node, frozenset())

    @cached_property
    def held(self) -> Mapping[NodeId, frozenset[int]]:
        """The blocks of each of its nodes, in the order of the routes."""
        found: dict[NodeId, frozenset[int]] = {}
        for chain in self.chains:
            for stage in chain:
                found[stage.node] = found.get(stage.node, frozenset()).union(stage.blocks)
        return found

    @cached_property
    def homes(self) -> tuple[tuple[NodeId, ...], ...]:
        """Of each route the node of each block."""
        return tuple(tuple(stage.node for stage in chain for _ in stage.blocks) for chain in self.chains)


@dataclass(frozen=True)
class Reach:
    """How fast a node comes by blocks, and those of one model that it has on its disk."""

    bytes_per_s: float
    """Over its links, each as often as the others: pieces of a file come from whichever holder the server picks."""
    read_bytes_per_s: float
    on_disk: frozenset[int]


def reaches_of(capacities: Mapping[NodeId, Capacity], digest: Digest) -> dict[NodeId, Reach]:
    """What these nodes say of it; to be made once for many moves."""
    found = {}
    for node, capacity in capacities.items():
        rates = [link.goodput_bytes_per_s for link in capacity.links if link.goodput_bytes_per_s is not None]
        found[node] = Reach(
            harmonic_mean(rates) if rates else DEFAULT_LINK_BYTES_PER_S,
            capacity.disk_read_bytes_per_s or DISK_BYTES_PER_S,
            frozenset[int]().union(*(stored.blocks for stored in capacity.on_disk if stored.model == digest)),
        )
    return found


@dataclass(frozen=True)
class NodeMove:
    """What one node has to do before it is ready."""

    node: NodeId
    blocks: int
    fetch_bytes: int
    fetch_s: float
    read_s: float
    build_s: float

    @property
    def seconds(self) -> float:
        return self.fetch_s + self.read_s + self.build_s


@dataclass(frozen=True)
class MoveCost:
    """D and every term of it."""

    nodes: tuple[NodeMove, ...]
    way: Way
    kv_bytes: int
    handover_s: float
    price: float
    """For the bytes, in Phi x seconds; so are the next three."""
    slowdown: float
    pause: float
    fixed: float

    @property
    def bytes(self) -> int:
        return self.kv_bytes + sum(node.fetch_bytes for node in self.nodes)

    @property
    def seconds(self) -> float:
        """T_mig."""
        return max((node.seconds for node in self.nodes), default=0.0) + self.handover_s

    @property
    def total(self) -> float:
        """D, in Phi x seconds."""
        return self.price + self.slowdown + self.pause + self.fixed

    @property
    def terms(self) -> dict[str, float]:
        """What an audit event or an explanation shows of it."""
        shown = {
            "move_total": self.total,
            "move_price": self.price,
            "move_slowdown": self.slowdown,
            "move_pause": self.pause,
            "move_fixed": self.fixed,
            "move_seconds": self.seconds,
            "move_bytes": self.bytes,
        }
        return {name: round(value, 3) for name, value in shown.items()}


def move_cost(
    before: Placed,
    after: Placed,
    reaches: Mapping[NodeId, Reach],
    manifest: Manifest,
    live: Live,
    prices: Prices,
) -> MoveCost:
    """D(before -> after); nodes of `after` must be in `reaches`."""
    nodes = tuple(
        _node_move(node, reaches[node], new, before.on(node), manifest)
        for node, held in after.held.items()
        if (new := held - before.on(node))
    )
    way, handover_s, kv_bytes = _handover(before, after, reaches, manifest, live)
    copying_s = max((node.seconds for node in nodes), default=0.0)
    return MoveCost(
        nodes=nodes,
        way=way,
        kv_bytes=kv_bytes,
        handover_s=handover_s,
        price=prices.per_byte * (kv_bytes + sum(node.fetch_bytes for node in nodes)),
        # Sequences that finish where they are stand still for nothing; the old epoch only lives longer.
        slowdown=prices.slowdown * (copying_s + (handover_s if way is Way.DRAIN else 0.0)),
        pause=0.0 if way is Way.DRAIN else prices.pause * handover_s,
        fixed=prices.fixed,
    )


def _node_move(node: NodeId, reach: Reach, new: frozenset[int], loaded: frozenset[int], manifest: Manifest) -> NodeMove:
    weight_bytes = sizes_of(manifest).weight_bytes
    size = sum([weight_bytes[block] for block in new])
    missing = sum([weight_bytes[block] for block in new - loaded - reach.on_disk])
    return NodeMove(
        node=node,
        blocks=len(new),
        fetch_bytes=missing,
        fetch_s=missing / reach.bytes_per_s,
        read_s=size / reach.read_bytes_per_s,
        build_s=size / BUILD_BYTES_PER_S + BUILD_S_PER_BLOCK * len(new),
    )


def _handover(
    before: Placed, after: Placed, reaches: Mapping[NodeId, Reach], manifest: Manifest, live: Live
) -> tuple[Way, float, int]:
    """The cheapest way for live sequences to cross: (way, seconds, bytes of caches)."""
    if not live.sequences:
        return Way.NONE, 0.0, 0
    kv_per_token, affected = 0.0, 0.0
    kv_bytes = sizes_of(manifest).kv_bytes_per_token
    for homes, share in zip(before.homes, before.shares, strict=True):
        # A route that is lost goes on with the one that is most like it; one that stays takes nothing along.
        moved = 0 if homes in after.homes else min(_moved_bytes(homes, other, kv_bytes) for other in after.homes)
        kv_per_token += share * moved
        affected += share if moved else 0.0
    kv = round(live.sequences * live.tokens * kv_per_token)
    if not kv:
        return Way.NONE, 0.0, 0
    ways = [
        (kv / min(reaches[node].bytes_per_s for node in after.held), Way.KV, kv),
        (live.sequences * affected * live.tokens * after.prefill_ms_per_token / 1e3, Way.RECOMPUTE, 0),
        (live.tokens_to_come * before.tpot_ms / 1e3, Way.DRAIN, 0),
    ]
    seconds, way, size = min(ways, key=lambda found: found[0])
    return way, seconds, size


def _moved_bytes(before: Sequence[NodeId], after: Sequence[NodeId], kv_bytes: Sequence[int]) -> int:
    """Of a token's caches, those of blocks that another node runs."""
    return sum([size for here, there, size in zip(before, after, kv_bytes, strict=True) if here != there])

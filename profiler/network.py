"""PURE: what a hop between two nodes takes, and what crosses it (mathematics.md A1). Times in milliseconds.

The network is a fixed latency per hop plus the bytes over the link's rate.
"""

from collections.abc import Mapping
from math import prod

from schemas.base import NodeId
from schemas.capacity import Capacity
from schemas.manifest import DTYPE_BYTES, Manifest, TensorSpec

DEFAULT_RTT_MS = 0.5
"""Between two nodes that have not measured each other: a local network."""
DEFAULT_LINK_BYTES_PER_S = 1e9 / 8
"""Gigabit Ethernet, until links are measured for their rate too."""
EDGE_FAULT_MS = 50.0
"""Added to a hop between two nodes that reach each other over the bus only, on top of what that road takes. Frames
that pass the broker share it with everybody's heartbeats and plans, so such an edge is for want of another: the price
is above any local network's round trip, so that a way around is taken, and finite, so that the model is served where
there is none."""
TOKEN_BYTES = 8
"""What returns from the head to the ingress: one token id."""


def hop_ms(capacities: Mapping[NodeId, Capacity], source: NodeId, target: NodeId, size: float) -> float:
    """net(n, n', z) of mathematics.md A1: half the round trip plus the bytes over the rate; 0 on one node. Over an
    edge whose link is down `EDGE_FAULT_MS` more."""
    if source == target:
        return 0.0
    fault_ms = EDGE_FAULT_MS if is_edge_fault(capacities, source, target) else 0.0
    sending_ms = 1e3 * size / link_bytes_per_s(capacities, source, target)
    return fault_ms + rtt_ms(capacities, source, target) / 2 + sending_ms


def is_edge_fault(capacities: Mapping[NodeId, Capacity], a: NodeId, b: NodeId) -> bool:
    """Whether one of the two says that it reaches the other over the bus, and not over its link."""
    return any(
        link.peer == there and not link.up
        for here, there in ((a, b), (b, a))
        for link in (capacities[here].links if here in capacities else ())
    )


def link_bytes_per_s(capacities: Mapping[NodeId, Capacity], source: NodeId, target: NodeId) -> float:
    """What the sender measured towards the receiver, else the other way, else Gigabit Ethernet."""
    for here, there in ((source, target), (target, source)):
        for link in capacities[here].links if here in capacities else ():
            if link.peer == there and link.goodput_bytes_per_s is not None:
                return link.goodput_bytes_per_s
    return DEFAULT_LINK_BYTES_PER_S


def rtt_ms(capacities: Mapping[NodeId, Capacity], source: NodeId, target: NodeId) -> float:
    """The slower of what the two nodes measured towards each other, over whichever road, a local network's if neither
    did."""
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


def _item_bytes(tensor: TensorSpec) -> int:
    fixed = prod(size for size in tensor.shape if isinstance(size, int) and size > 0)
    return fixed * DTYPE_BYTES[tensor.dtype]

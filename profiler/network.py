"""PURE: what a hop between two nodes takes, and what crosses it (mathematics.md A1). Times in milliseconds.

The network is a fixed latency per hop plus the bytes over the link's rate.
"""

from collections.abc import Mapping
from math import prod

from schemas.base import NodeId
from schemas.capacity import Capacity, LinkEstimate
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
NO_LINKS: Mapping[NodeId, LinkEstimate] = {}


Links = Mapping[NodeId, Mapping[NodeId, LinkEstimate]]
"""By the node that measured it, and its peer."""


def links_of(capacities: Mapping[NodeId, Capacity]) -> Links:
    """What all of these nodes measured; to be made once for many questions."""
    return {name: links_by_peer(capacity) for name, capacity in capacities.items()}


def links_by_peer(capacity: Capacity) -> dict[NodeId, LinkEstimate]:
    """What one node measured."""
    return {link.peer: link for link in capacity.links}


def hop_ms(links: Links, source: NodeId, target: NodeId, size: float) -> float:
    """net(n, n', z) of mathematics.md A1: half the round trip plus the bytes over the rate; 0 on one node. Over an
    edge whose link is down `EDGE_FAULT_MS` more."""
    latency_ms, byte_ms = edge_ms(links, source, target)
    return latency_ms + size * byte_ms


def edge_ms(links: Links, source: NodeId, target: NodeId) -> tuple[float, float]:
    """What a hop takes however little crosses it, and what each byte adds to that."""
    if source == target:
        return 0.0, 0.0
    there, back = links.get(source, NO_LINKS).get(target), links.get(target, NO_LINKS).get(source)
    is_faulty = (there is not None and not there.up) or (back is not None and not back.up)
    return (EDGE_FAULT_MS if is_faulty else 0.0) + _rtt_ms(there, back) / 2, 1e3 / _bytes_per_s(there, back)


def _rtt_ms(there: LinkEstimate | None, back: LinkEstimate | None) -> float:
    """The slower of what the two nodes measured towards each other, over whichever road, a local network's if neither
    did."""
    if there is None or back is None:
        known = there or back
        return DEFAULT_RTT_MS if known is None else known.rtt_ms
    return max(there.rtt_ms, back.rtt_ms)


def _bytes_per_s(there: LinkEstimate | None, back: LinkEstimate | None) -> float:
    """What the sender measured towards the receiver, else the other way, else Gigabit Ethernet."""
    for link in (there, back):
        if link is not None and link.goodput_bytes_per_s is not None:
            return link.goodput_bytes_per_s
    return DEFAULT_LINK_BYTES_PER_S


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

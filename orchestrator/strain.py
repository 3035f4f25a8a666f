"""PURE: how much slower nodes are while they serve a deployment than they were when its blocks were loaded there.

A node that serves shares its processors with whatever serving takes: the ingress' own work, the links, the other
processes of a machine. A node at rest shows the times of an empty one, and beside it every node in use looks slow; a
plan that moved there would find it as slow. So nodes are compared at rest, and each plan with the strain that serving
puts on its nodes: the ingress bears one, the others another. Both are learned over a minute, so what slows one node
now is that node's own, and it is remembered for a while after it is at rest; unless that node says itself what others
take of its device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from math import exp
from statistics import median

from schemas.base import NodeId
from schemas.capacity import Capacity
from schemas.deployment import Placement

LEARNED_S = 60.0
"""A node that is slowed is to be left within ten seconds, of which this takes for usual a sixth."""
ELAPSED_MAX_S = 10.0
REMEMBERED_S = 300.0
INGRESS_MAX = 1.5
"""An ingress that is so many times slower than the others is so of its own: there may be but one, and what it suffers
would be expected of every other that could take its place."""
OWN_MIN = 1.25
"""Less than this is noise, and nothing of a node's own."""


@dataclass(frozen=True)
class Strain:
    """What is known of it for one deployment."""

    source: float | None = None
    """How many times slower than at rest an ingress is; None before one served."""
    other: float | None = None
    """The same of nodes that are not one."""
    own: Mapping[NodeId, tuple[float, datetime]] = field(default_factory=dict)
    """How many times slower than others in its place a node was, and when it was last in use."""
    at: datetime | None = None

    def on(self, node: NodeId, chains: Placement) -> float:
        """What serving would put on a node of a placement."""
        known = (self.source, self.other) if node in _sources(chains) else (self.other, self.source)
        return next((one for one in known if one is not None), 1.0)

    @property
    def unplaced(self) -> float:
        """What serving would put on a node of which nobody knows yet whether it is an ingress: what others bear."""
        return next((one for one in (self.other, self.source) if one is not None), 1.0)

    @property
    def least(self) -> float:
        return min((one for one in (self.source, self.other) if one is not None), default=1.0)

    def at_rest(
        self, node: NodeId, capacity: Capacity, chains: Placement, now: datetime, beside: bool = False
    ) -> float:
        """What to multiply the times of a node by, so that they are those of the node at rest. `beside`: it shares its
        machine with nodes of `chains`, so that what it meets there may be them."""
        if capacity.slowdown is not None:
            return 1 / self.on(node, chains)
        if capacity.contention is not None and not beside:
            return capacity.contention if capacity.contention >= OWN_MIN else 1.0
        factor, seen_at = self.own.get(node, (1.0, now))
        return 1 + (factor - 1) * exp(-(now - seen_at).total_seconds() / REMEMBERED_S)

    def slowness(self, node: NodeId, capacity: Capacity, chains: Placement, beside: bool = False) -> float | None:
        """How many times slower than with nothing else to do a node is now; None where it does not say. `beside` as
        for `at_rest`."""
        if capacity.slowdown is not None:
            return capacity.slowdown / self.on(node, chains)
        return None if beside else capacity.contention


UNSTRAINED = Strain()


def learned(before: Strain, slowdowns: Mapping[NodeId, float], chains: Placement, now: datetime) -> Strain:
    """What the nodes show now that are at work for `chains`; the others are not in `slowdowns`."""
    elapsed_s = 0.0 if before.at is None else (now - before.at).total_seconds()
    # After a pause the first look is one look, and not all that the pause could have shown.
    weight = 1 - exp(-min(max(elapsed_s, 0.0), ELAPSED_MAX_S) / LEARNED_S)
    sources = _sources(chains)
    nodes = dict.fromkeys(NodeId(stage.node) for chain in chains for stage in chain)
    shown = {node: slowdowns[node] for node in nodes if node in slowdowns}
    if not shown:
        return before
    source = _between(before.source, [slowdown for node, slowdown in shown.items() if node in sources], weight)
    other = _between(before.other, [slowdown for node, slowdown in shown.items() if node not in sources], weight)
    if source is not None and other is not None:
        other = min(other, source)  # an ingress does what the others do, and more
        source = min(source, INGRESS_MAX * other)
    found = Strain(source, other, at=now)
    own = {
        node: (excess, at)
        for node, (excess, at) in before.own.items()
        if node not in shown and (now - at).total_seconds() < REMEMBERED_S
    }
    for node, slowdown in shown.items():
        if (excess := slowdown / found.on(node, chains)) >= OWN_MIN:
            own[node] = (excess, now)
    return Strain(found.source, found.other, own, now)


def _between(old: float | None, new: list[float], weight: float) -> float | None:
    if not new:
        return old
    return median(new) if old is None else old ** (1 - weight) * median(new) ** weight


def _sources(chains: Placement) -> frozenset[str]:
    return frozenset(chain[0].node for chain in chains)

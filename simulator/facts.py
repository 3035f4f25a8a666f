"""PURE: every node and link as it truly is at any time of a run, as heartbeats would say it that neither err nor lie.

A link's rate counts in steps of a tenth, so that what hardly differs is priced once.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import exp, inf, log, log1p
from statistics import fmean

from schemas.base import NodeId
from schemas.capacity import Capacity, LinkEstimate
from simulator.kernel import EPOCH
from simulator.model import Physics, provider_of, scaled
from simulator.scenario import LinkSpec, NodeSpec, Scenario
from simulator.truth import Truth

STEP = 0.1
"""What differs by less is the same: a queue at 70 % load makes a third more of it."""
FACTOR_MAX = 1e6
"""A link that is slower still is as slow as this."""
SEARCHED_MAX = 64
"""Nodes among which placements are looked for, the fastest: among more, nobody measures all links either
(`orchestrator.beliefs`)."""

Span = tuple[float, float]
Pair = tuple[NodeId, NodeId]


class Facts:
    """What is so of one scenario and seed."""

    def __init__(self, scenario: Scenario, physics: Physics, truth: Truth) -> None:
        self.truth = truth
        self._scenario, self._physics = scenario, physics
        self.specs: dict[NodeId, NodeSpec] = {
            node: scenario.kinds[site.node] for site in scenario.sites for node in site.members
        }
        self._downs = _spans(truth, ("kill", "hang", "cut"))
        self._kills = _spans(truth, ("kill",))
        self._known: dict[tuple[NodeId, float], Capacity] = {}
        """Nodes that are so slow, without links."""

    def capacities(self, nodes: Iterable[NodeId], pairs: Iterable[Pair], at_s: float | None) -> dict[NodeId, Capacity]:
        """Nodes with those links between them, as they are at a time, those that are away too; None: undisturbed."""
        links: dict[NodeId, list[LinkEstimate]] = {node: [] for node in nodes}
        for a, b in pairs:
            links[a].append(self._link(a, b, 1.0 if at_s is None else stepped_back(self.link_step(a, b, at_s))))
        slow = {node: 1.0 if at_s is None else self.truth.node_factor(node, at_s) for node in links}
        return {node: self._capacity(node, slow[node], found) for node, found in links.items()}

    def undisturbed(self) -> dict[NodeId, Capacity]:
        """The fastest nodes as they are if nothing goes wrong."""
        chosen = self._fastest(dict.fromkeys(self.specs, 1.0))
        return self.capacities(chosen, _halves(chosen), None)

    def present(self, at_s: float) -> dict[NodeId, Capacity]:
        """The fastest of the nodes that are there at a time."""
        here = {node: self.truth.node_factor(node, at_s) for node in self.specs if not self.is_down(node, at_s)}
        chosen = self._fastest(here)
        return self.capacities(chosen, _halves(chosen), at_s)

    def mean(self, begin_s: float, end_s: float, times: Sequence[float]) -> dict[NodeId, Capacity]:
        """The fastest nodes in their mean state between two times, sampled at `times`: mean times of blocks, of a node
        that is away part of the time as much longer, and mean rates of links. One that is never there is not in it."""
        whole_s = end_s - begin_s
        slow: dict[NodeId, float] = {}
        for node in self.specs:
            here_s = whole_s - sum(max(0.0, min(b, end_s) - max(a, begin_s)) for a, b in self._merged([node]))
            if here_s > 0:
                slow[node] = fmean(self.truth.node_factor(node, at_s) for at_s in times) * whole_s / here_s
        chosen = self._fastest(slow)
        links: dict[NodeId, list[LinkEstimate]] = {node: [] for node in chosen}
        for a, b in _halves(chosen):
            rate = fmean(1 / self.truth.path_factor(a, b, at_s) for at_s in times)
            links[a].append(self._link(a, b, min(1 / rate, FACTOR_MAX) if rate else FACTOR_MAX))
        return {node: self._capacity(node, slow[node], links[node]) for node in chosen}

    def link_step(self, a: NodeId, b: NodeId, at_s: float) -> int:
        """How many steps slower than undisturbed the link is."""
        return round(log(min(self.truth.path_factor(a, b, at_s), FACTOR_MAX)) / log1p(STEP))

    def is_down(self, node: NodeId, at_s: float) -> bool:
        """Whether it is dead, hangs, or is cut off."""
        return any(a <= at_s < b for a, b in self._downs.get(node, ()))

    def back_s(self, node: NodeId, at_s: float) -> float:
        """From when on it is there; infinite if never again."""
        return next((b for a, b in self._merged([node]) if a <= at_s < b), at_s)

    def away(
        self, nodes: Iterable[NodeId], begin_s: float, end_s: float, *, since_s: float | None = None
    ) -> list[Span]:
        """When in a time some of these is away, as spans in order that do not meet. `since_s`: one that died since then
        is away for good."""
        every = list(nodes)
        spans = [(max(a, begin_s), min(b, end_s)) for a, b in self._merged(every) if a < end_s and b > begin_s]
        if since_s is None:
            return spans
        deaths = (a for node in every for a, _ in self._kills.get(node, ()) if since_s <= a < end_s)
        death = max(begin_s, min(deaths, default=inf))
        return [*(span for span in spans if span[0] < death), *([(death, end_s)] if death < end_s else [])]

    def _merged(self, nodes: Iterable[NodeId]) -> list[Span]:
        merged: list[Span] = []
        for a, b in sorted(span for node in nodes for span in self._downs.get(node, ())):
            if merged and a <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
            else:
                merged.append((a, b))
        return merged

    def _fastest(self, slow: Mapping[NodeId, float]) -> list[NodeId]:
        """`SEARCHED_MAX` of them at most, by the time that all blocks take; in the order of the scenario."""
        blocks = range(len(self._physics.manifest.blocks))
        taken = {
            node: factor * sum(self._physics.time_of(node, self.specs[node], block).decode_ms for block in blocks)
            for node, factor in slow.items()
        }
        kept = set(sorted(taken, key=lambda node: taken[node])[:SEARCHED_MAX])
        return [node for node in self.specs if node in kept]

    def _capacity(self, node: NodeId, slow: float, links: Iterable[LinkEstimate]) -> Capacity:
        known = self._known.get((node, slow))
        if known is None:
            known = self._known[node, slow] = _slowed(self._unhindered(node), slow)
        return known.model_copy(update={"links": tuple(links)})

    def _unhindered(self, node: NodeId) -> Capacity:
        spec, blocks = self.specs[node], range(len(self._physics.manifest.blocks))
        return Capacity(
            node=node,
            boot="truth",
            sequence=0,
            issued_at=EPOCH,
            version="truth",
            provider=provider_of(spec),
            tier=spec.tier,
            price_per_hour=spec.price_per_hour,
            threads=1,
            memory_total_bytes=spec.memory_bytes,
            memory_free_bytes=spec.memory_bytes,
            disk_free_bytes=1 << 40,
            load=0.0,
            disk_read_bytes_per_s=spec.disk_bytes_per_s,
            block_times=tuple(self._physics.time_of(node, spec, block) for block in blocks),
            machine=node,
            cores=(0,),
            frame_ms=1e3 * self._physics.frame_s,
        )

    def _link(self, a: NodeId, b: NodeId, factor: float) -> LinkEstimate:
        spec = self._link_spec(a, b)
        rate = spec.mbit_per_s * 1e6 / 8 / factor
        return LinkEstimate(peer=b, rtt_ms=spec.rtt_ms, goodput_bytes_per_s=rate, direct=True)

    def _link_spec(self, a: NodeId, b: NodeId) -> LinkSpec:
        network = self._scenario.network
        if self.truth.sites[a] == self.truth.sites[b]:
            return network.within
        return network.cloud if "cloud" in (self.specs[a].tier, self.specs[b].tier) else network.between


def stepped_back(steps: int) -> float:
    """How many times slower so many steps are."""
    return exp(steps * log1p(STEP))


def stepped(value: float) -> float:
    """The nearest value in whole steps; above 0."""
    return stepped_back(round(log(value) / log1p(STEP)))


def _spans(truth: Truth, kinds: Sequence[str]) -> dict[NodeId, tuple[Span, ...]]:
    """By node, when a spell of these kinds is upon it."""
    members: dict[str, list[NodeId]] = {}
    for node, site in truth.sites.items():
        members.setdefault(site, []).append(node)
    found: dict[NodeId, list[Span]] = {}
    for spell in truth.spells:
        for node in members.get(spell.what, [NodeId(spell.what)]) if spell.kind in kinds else ():
            found.setdefault(node, []).append((spell.begin_s, spell.end_s))
    return {node: tuple(sorted(spans)) for node, spans in found.items()}


def _halves(nodes: Sequence[NodeId]) -> list[Pair]:
    """Every pair once: a link is as good one way as the other."""
    return [(a, b) for number, a in enumerate(nodes) for b in nodes[number + 1 :]]


def _slowed(capacity: Capacity, factor: float) -> Capacity:
    times = tuple(scaled(time, factor) for time in capacity.block_times)
    return capacity.model_copy(update={"block_times": times})

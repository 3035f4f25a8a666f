"""PURE: what truly happens to nodes and links, drawn before a run from the scenario and the seed.

It does not depend on who decides: every policy meets the same world. Only the world sees it; what decides sees
telemetry. Spells overlap: a node lives while none of its spells kills it, and slow times multiply.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from schemas.base import NodeId
from simulator.draws import Draws
from simulator.quality import CALM, Quality, Steps, multiplied, quality, refuse_restless
from simulator.records import Spell
from simulator.scenario import Fault, Scenario
from simulator.spells import LINK_KINDS, Drawn, LinkFault, drawn

SLOWEST = 20.0
"""Times slower than it should be, at most, that files come over a link, cut or not: they are asked for again and again.
"""
IN_FORCE = 2.0
"""Any number but 1, the product of no spells."""


@dataclass(frozen=True, slots=True)
class Change:
    """A spell begins or ends. What holds afterwards, `Truth` says: another spell may be in force too."""

    at_s: float
    what: str
    """A node; of `links` and `cut` also a site, all of it; `cloud-links`; `orchestrator`."""
    kind: str
    """A `Fault.kind`."""
    begins: bool
    factor: float


class Truth:
    """What is so at any time. A time on the edge of a spell is in it at its beginning and out of it at its end.

    Lookups bisect. Links are drawn when they are first asked about, each from a stream of its own.
    """

    late: tuple[Fault, ...]
    """Faults whose victims depend on the plan in force (`Where.in_plan`); they are in no other answer of this."""
    spells: tuple[Spell, ...]
    """All of them by when they begin, those that outlast the run cut at its end."""
    changes: tuple[Change, ...]
    """All that begins or ends before the end of the run, in order of time, ends before beginnings. What happens to a
    whole site is there once for each of its nodes, except to its links."""

    def __init__(self, scenario: Scenario, draws: Draws, found: Drawn) -> None:
        self._scenario, self._draws, self._faults = scenario, draws, found.links
        self.horizon_s = scenario.duration_s + scenario.drain_s
        members: dict[str, tuple[NodeId, ...]] = {site.name: site.members for site in scenario.sites}
        self.sites: dict[NodeId, str] = {node: name for name, nodes in members.items() for node in nodes}
        """Where each node is."""
        self._cloud = {site.name for site in scenario.sites if scenario.kinds[site.node].tier == "cloud"}
        self.late = found.late
        self.spells = tuple(
            spell if spell.end_s <= self.horizon_s else replace(spell, end_s=self.horizon_s)
            for spell in found.spells
            if spell.begin_s < self.horizon_s
        )
        single = [
            spell if what == spell.what else replace(spell, what=what)
            for spell in found.spells
            for what in (members.get(spell.what, (spell.what,)) if spell.kind not in LINK_KINDS else (spell.what,))
        ]
        self.changes = _changes(single, self.horizon_s)
        self._nodes = _by_node(single)
        self._quality: dict[tuple[str, str], Quality] = {}
        self._links: dict[tuple[str, str], tuple[Quality, Steps]] = {}
        """Between two sites or two nodes, no node having the name of a site: what varies by itself, and the faults."""
        self._single = {node for fault in found.links for node in fault.nodes if self.sites[node] not in fault.sites}
        """Nodes that have link faults that their sites do not have."""

    def node_factor(self, node: NodeId, t: float) -> float:
        """How many times longer a node computes than it should, at least 1."""
        return max(1.0, self._of(node, "factor").at(t))

    def alive(self, node: NodeId, t: float) -> bool:
        return self._of(node, "kill").at(t) == 1

    def hangs(self, node: NodeId, t: float) -> bool:
        """It is stopped: it answers nothing and forgets nothing."""
        return self._of(node, "hang").at(t) != 1

    def throttled(self, node: NodeId, t: float) -> bool:
        """Whether it would say of itself that it is slower than it could be."""
        return self._of(node, "throttle").at(t) != 1

    def lies(self, node: NodeId, t: float) -> float:
        """By what the times are divided that a node reports; 1 for an honest one."""
        return self._of(node, "lie").at(t)

    def link_factor(self, site_a: str, site_b: str, t: float) -> float:
        """How many times slower the links between two sites are, or within one; infinite if they are cut.

        It may be a little below 1, for rates vary about their median. What happens to single nodes shows in
        `path_factor` alone. Among the victims of one cut links go on: it is between them and the others.
        """
        varies, faults = self._links.get((site_a, site_b)) or self._link(site_a, site_b)
        return varies.at(t) * faults.at(t)

    def path_factor(self, node_a: NodeId, node_b: NodeId, t: float) -> float:
        """The same between two nodes, what happens to single ones included; 1 from a node to itself."""
        if node_a == node_b:
            return 1.0
        varies, faults = self._links.get((node_a, node_b)) or self._path(node_a, node_b)
        return varies.at(t) * faults.at(t)

    def passing_s(self, node_a: NodeId, node_b: NodeId, t: float, work_s: float) -> float:
        """How long it takes from `t` on to bring over what takes `work_s` where nothing slows the link. What is on its
        way when a link becomes bad, or good again, feels it; where a link is cut it is tried at `SLOWEST`."""
        if node_a == node_b:
            return work_s
        varies, faults = self._links.get((node_a, node_b)) or self._path(node_a, node_b)
        at = t
        while True:
            factor = min(varies.at(at) * faults.at(at), SLOWEST)
            until = min(varies.until(at), faults.until(at))
            if at + work_s * factor <= until:
                return at - t + work_s * factor
            work_s -= (until - at) / factor
            at = until

    def _link(self, a: str, b: str) -> tuple[Quality, Steps]:
        hits = [(fault, a in fault.sites, b in fault.sites) for fault in self._faults]
        self._links[a, b] = found = self._varies(a, b), self._faulty(a, b, hits)
        return found

    def _path(self, a: NodeId, b: NodeId) -> tuple[Quality, Steps]:
        sites = self.sites[a], self.sites[b]
        if self._single.isdisjoint((a, b)):
            found = self._links.get(sites) or self._link(*sites)
        else:
            hits = [(fault, a in fault.nodes, b in fault.nodes) for fault in self._faults]
            found = self._varies(*sites), self._faulty(*sites, hits)
        self._links[a, b] = found
        return found

    def _faulty(self, site_a: str, site_b: str, links: Iterable[tuple[LinkFault, bool, bool]]) -> Steps:
        """The faults of one link, each with whether its two ends are among the victims."""
        to_cloud = (site_a in self._cloud) != (site_b in self._cloud)
        spans = []
        for fault, a, b in links:
            match fault.kind:
                case "cloud-links":
                    hit = to_cloud
                case "cut":
                    hit = a != b
                case _:
                    hit = a or b
            if hit:
                spans.append((fault.begin_s, fault.end_s, inf if fault.kind == "cut" else fault.factor))
        return multiplied(spans)

    def _varies(self, site_a: str, site_b: str) -> Quality:
        sites = (site_a, site_b) if site_a <= site_b else (site_b, site_a)
        found = self._quality.get(sites)
        if found is None:
            network = self._scenario.network
            if sites[0] == sites[1]:
                link = network.within
            elif self._cloud.isdisjoint(sites):
                link = network.between
            else:
                link = network.cloud
            rng = self._draws.stream(f"link {sites[0]} {sites[1]}")
            found = self._quality[sites] = quality(link, rng, self.horizon_s)
        return found

    def _of(self, node: NodeId, kind: str) -> Steps:
        return self._nodes.get((node, kind), CALM)


def timeline(scenario: Scenario, draws: Draws) -> Truth:
    """All that will go wrong in a run of `scenario` with this seed.

    Raises `ResplitError(INVALID_REQUEST)` naming the key if churn or links change oftener than is worth drawing.
    """
    refuse_restless(scenario, scenario.duration_s + scenario.drain_s)
    return Truth(scenario, draws, drawn(scenario, draws))


def _changes(spells: Sequence[Spell], horizon_s: float) -> tuple[Change, ...]:
    found = [
        Change(at_s, spell.what, spell.kind, begins, spell.factor)
        for spell in spells
        for at_s, begins in ((spell.begin_s, True), (spell.end_s, False))
        if at_s < horizon_s
    ]
    return tuple(sorted(found, key=lambda change: (change.at_s, change.begins, change.what, change.kind)))


def _by_node(spells: Sequence[Spell]) -> dict[tuple[str, str], Steps]:
    """By node and what is asked: `factor`, `lie`, or a kind of which it is asked whether it is in force."""
    spans: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for spell in spells:
        asked: tuple[tuple[str, float], ...] = ()
        match spell.kind:
            case "kill" | "hang":
                asked = ((spell.kind, IN_FORCE),)
            case "throttle":
                asked = (("throttle", IN_FORCE), ("factor", spell.factor))
            case "slow":
                asked = (("factor", spell.factor),)
            case "lie":
                asked = (("lie", spell.factor),)
        for key, factor in asked:
            spans.setdefault((spell.what, key), []).append((spell.begin_s, spell.end_s, factor))
    return {key: multiplied(found) for key, found in spans.items()}

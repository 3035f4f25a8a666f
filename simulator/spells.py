"""PURE: when nodes and links are not as they should be, drawn from a scenario before anything runs in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from numpy.random import Generator

from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from simulator.draws import Draws
from simulator.records import Spell
from simulator.scenario import Fault, Scenario, SiteSpec

CLOUD_LINKS = "cloud-links"
ORCHESTRATOR = "orchestrator"
LINK_KINDS = ("links", "cut", "cloud-links")
LEADER_KINDS = ("leader", "lock", "redeploy")
"""Of no node."""

SPELLS_MAX = 1_000_000
"""What comes by itself is drawn before the run and kept; more than this is a mistyped mean time."""


@dataclass(frozen=True, slots=True)
class LinkFault:
    """One fault of links, and all that it is about: a link between two of its victims is cut by no partition, and is
    slowed once."""

    kind: str
    begin_s: float
    end_s: float
    factor: float
    nodes: frozenset[NodeId]
    sites: frozenset[str]
    """Those all of whose nodes are among them."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What goes wrong; a spell that does not end by itself ends at infinity."""

    spells: tuple[Spell, ...]
    links: tuple[LinkFault, ...]
    late: tuple[Fault, ...]
    """Faults whose victims depend on the plan in force."""


def drawn(scenario: Scenario, draws: Draws) -> Drawn:
    """The scenario's faults with their victims, and what its churn brings, in order of time.

    Raises `ResplitError(INVALID_REQUEST)` if the churn is more than `SPELLS_MAX` spells.
    """
    spells: list[Spell] = []
    links: list[LinkFault] = []
    late: list[Fault] = []
    by_name = {site.name: site for site in scenario.sites}
    for number, fault in enumerate(scenario.faults):
        times = fault.until(scenario.duration_s)
        if fault.kind not in (*LEADER_KINDS, "cloud-links") and fault.where.in_plan is not None:
            late += times
            continue
        names = [ORCHESTRATOR if fault.kind in LEADER_KINDS else CLOUD_LINKS]
        members, whole = frozenset[NodeId](), frozenset[str]()
        if fault.kind not in (*LEADER_KINDS, "cloud-links"):
            sites, nodes = _victims(scenario, fault, draws.stream(f"fault {number}"))
            names = [*(site.name for site in sites), *nodes]
            members = frozenset(node for site in sites for node in site.members) | frozenset(nodes)
            whole = frozenset(name for name, site in by_name.items() if members.issuperset(site.members))
        for one in times:
            end_s = inf if one.lasts_s is None else one.at_s + one.lasts_s
            spells += [Spell(name, one.kind, one.at_s, end_s, one.factor) for name in names]
            if one.kind in LINK_KINDS:
                links.append(LinkFault(one.kind, one.at_s, end_s, one.factor, members, whole))
    spells += _churn(scenario, draws)
    spells = [spell for spell in spells if spell.end_s > spell.begin_s]
    spells.sort(key=lambda spell: (spell.begin_s, spell.what, spell.kind, spell.end_s))
    return Drawn(tuple(spells), tuple(links), tuple(late))


def _victims(scenario: Scenario, fault: Fault, rng: Generator) -> tuple[list[SiteSpec], list[NodeId]]:
    """The whole sites and the single nodes that a fault is about; whom nobody named is everybody.

    Of a share of single nodes as many are drawn as come nearest to it; of a share of sites, sites until their nodes
    are at least that many.
    """
    where = fault.where
    everybody = not where.sites and not where.nodes
    sites = [site for site in scenario.sites if everybody or site.name in where.sites]
    if where.share is None:
        inside = {node for site in sites for node in site.members}
        return sites, [NodeId(node) for node in dict.fromkeys(where.nodes) if node not in inside]
    if where.by_site:
        wanted = round(where.share * sum(site.nodes for site in sites))
        chosen: list[int] = []
        for position in rng.permutation(len(sites)):
            if sum(sites[taken].nodes for taken in chosen) >= wanted:
                break
            chosen.append(int(position))
        return [sites[position] for position in sorted(chosen)], []
    pool = list(dict.fromkeys([node for site in sites for node in site.members] + list(where.nodes)))
    taken = rng.permutation(len(pool))[: round(where.share * len(pool))]
    return [], [pool[position] for position in sorted(int(position) for position in taken)]


def _churn(scenario: Scenario, draws: Draws) -> Iterator[Spell]:
    """Deaths of nodes and of sites, and slow times: renewal processes, each with a stream of its own.

    What is well stays so for an exponential time with the mean that the scenario gives, and then is not for another.
    """
    churn = scenario.churn
    begin_s = churn.after_s
    end_s = scenario.duration_s + scenario.drain_s if churn.until_s is None else churn.until_s
    nodes = [node for site in scenario.sites for node in site.members]
    for count, key, well_s, ill_s in (
        (len(nodes), "mtbf_s", churn.mtbf_s, churn.mttr_s),
        (len(scenario.sites), "site_mtbf_s", churn.site_mtbf_s, churn.site_mttr_s),
        (len(nodes), "slow_every_s", churn.slow_every_s, churn.slow_s),
    ):
        if well_s is not None and (expected := count * max(0.0, end_s - begin_s) / (well_s + ill_s)) > SPELLS_MAX:
            message = f"scenario {scenario.name!r}: churn.{key} = {well_s:g} makes about {expected:.3g} spells"
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"{message}; {SPELLS_MAX} at most", f"churn.{key}")
    for site in scenario.sites:
        if churn.site_mtbf_s is not None:
            rng = draws.stream(f"deaths of site {site.name}")
            for at_s, until_s in _renewals(rng, churn.site_mtbf_s, churn.site_mttr_s, begin_s, end_s):
                yield Spell(site.name, "kill", at_s, until_s)
    for node in nodes:
        if churn.mtbf_s is not None:
            rng = draws.stream(f"deaths of {node}")
            for at_s, until_s in _renewals(rng, churn.mtbf_s, churn.mttr_s, begin_s, end_s):
                yield Spell(node, "kill", at_s, until_s)
        if churn.slow_every_s is not None:
            rng = draws.stream(f"slow times of {node}")
            for at_s, until_s in _renewals(rng, churn.slow_every_s, churn.slow_s, begin_s, end_s):
                yield Spell(node, "slow", at_s, until_s, churn.slow_factors[int(rng.integers(len(churn.slow_factors)))])


def _renewals(
    rng: Generator, well_s: float, ill_s: float, begin_s: float, end_s: float
) -> Iterator[tuple[float, float]]:
    """Ill times as (begin, end), those that begin before `end_s`.

    In whole microseconds, so that machines whose mathematics differ in the last bit draw the same.
    """
    at_s = begin_s
    while (at_s := at_s + rng.exponential(well_s)) < end_s:
        until_s = at_s + rng.exponential(ill_s)
        yield round(at_s, 6), round(until_s, 6)
        at_s = until_s

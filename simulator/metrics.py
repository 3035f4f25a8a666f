"""PURE: what one run amounts to, by the definitions of mathematics.md part D, each quoted where it is computed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from orchestrator.decision import Action, action_between
from schemas.base import Value
from schemas.slo import Slo
from simulator.records import Epoch, NodeUse, Outcome, RunResult
from simulator.scenario import RequestClass

INCIDENT_S = 1.0
"""Shorter intervals are no incident of downtime."""
MERGED_S = 5.0
"""Incidents closer than this are one."""
TRANSITION_S = 5.0
"""Around a change of plans, either way."""
HOUR_S = 3600.0


class Quantiles(Value):
    """Of times, in milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


class ClassMetrics(Value):
    """One class of requests. What no request can tell is None, here and in `Metrics`."""

    name: str
    arrived: int
    completed: int
    met: int
    """All that their class is held to."""
    latency_ms: Quantiles | None
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    incidents: int
    """Of downtime."""

    @property
    def qos(self) -> float | None:
        return self.met / self.arrived if self.arrived else None


class Metrics(Value):
    """One run. Shares are between 0 and 1."""

    classes: tuple[ClassMetrics, ...]
    arrived: int
    completed: int
    latency_ms: Quantiles | None
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    qos: float | None
    qos_worst: float | None
    """Of the class that fares worst."""
    utilisation: float | None
    goodput_utilisation: float | None
    jain: float | None
    memory: float | None
    """Mean over hosting nodes of the largest share of its memory that each had in use."""
    memory_peak: float | None
    """Of the fullest of them."""
    incidents_per_hour: float
    """Of downtime, over all classes."""
    incidents_per_fault: float | None
    down_s_per_hour: float
    """Likewise over all classes: an outage is one incident however long it is, and requests that fail here and there
    are many."""
    down_s_max: float | None
    """The longest incident."""
    mttr_s: float | None
    violations: int
    """Invariants broken, those of privacy among them: must be 0."""
    exposed: float | None
    """Fraction of requests whose answer names an untrusted node among those that computed it."""
    redistributes_per_hour: float
    """Changes of plans in which stages went to other nodes, and the cuts stayed."""
    resplits_per_hour: float
    """Those in which cuts moved."""
    routes_per_hour: float
    """Those in which a route came or went."""
    kept_per_hour: float
    """Plans issued anew for the placement that was there."""
    aborts: int
    moved_bytes: float
    planner_s: float
    gap: float | None
    phi: float | None
    phi_bound: float | None = None
    """That of free switching, the same whoever decides: nobody's own."""
    transition_ms: Quantiles | None
    """Latency of the requests that met a change of plans."""
    energy_j: float | None
    """Per request completed, what failed included in what was spent."""

    @property
    def reconfigurations_per_hour(self) -> float:
        return self.redistributes_per_hour + self.resplits_per_hour + self.routes_per_hour


@dataclass(frozen=True, slots=True)
class Incident:
    """Downtime of one class: nothing that arrived between these completed."""

    begin_s: float
    """The last arrival before it that completed (or the beginning of the run)."""
    down_s: float
    """The first arrival that did not complete."""
    end_s: float
    """The first arrival after it that completes (or the end of the run, which then cuts it short)."""

    @property
    def repair_s(self) -> float:
        return self.end_s - self.down_s


def measure(result: RunResult, classes: Sequence[RequestClass]) -> Metrics:
    """The metrics of a run whose requests are of `classes`."""
    slos = {each.name: each.slo for each in classes}
    by_class: dict[str, list[Outcome]] = {str(name): [] for name in slos}
    for outcome in result.outcomes:
        by_class[outcome.arrival.name].append(outcome)
    down = {name: incidents(result, outcomes) for name, outcomes in by_class.items()}
    rows = tuple(
        ClassMetrics(
            name=str(name),
            arrived=len(by_class[name]),
            completed=sum(completed(outcome, result.timeout_s) for outcome in by_class[name]),
            met=sum(met(outcome, slo, result.timeout_s) for outcome in by_class[name]),
            latency_ms=latencies(by_class[name], result.timeout_s),
            ttft_ms=ttfts(by_class[name], result.timeout_s),
            tpot_ms=tpots(by_class[name], result.timeout_s),
            incidents=len(down[name]),
        )
        for name, slo in slos.items()
    )
    hours = (result.end_s - result.begin_s) / HOUR_S
    found = [incident for each in down.values() for incident in each]
    repairs = [incident.repair_s for incident in found]
    faults = sum(result.begin_s <= spell.begin_s <= result.end_s for spell in result.spells)
    done = sum(row.completed for row in rows)
    arrived = len(result.outcomes)
    hosts = [node for node in result.nodes if node.hosting_s > 0]
    kinds = Counter(
        action for epoch, action in actions(result.epochs) if result.begin_s <= epoch.begin_s <= result.end_s
    )
    return Metrics(
        classes=rows,
        arrived=arrived,
        completed=done,
        latency_ms=latencies(result.outcomes, result.timeout_s),
        ttft_ms=ttfts(result.outcomes, result.timeout_s),
        tpot_ms=tpots(result.outcomes, result.timeout_s),
        qos=sum(row.met for row in rows) / arrived if arrived else None,
        qos_worst=min((row.qos for row in rows if row.qos is not None), default=None),
        utilisation=_share([node.busy_s for node in hosts], hosts),
        goodput_utilisation=_share([node.good_s for node in hosts], hosts),
        jain=jain([node.busy_s / node.alive_s for node in hosts if node.alive_s > 0]),
        memory=sum(node.memory_peak for node in hosts) / len(hosts) if hosts else None,
        memory_peak=max((node.memory_peak for node in hosts), default=None),
        incidents_per_hour=len(found) / hours,
        incidents_per_fault=len(found) / faults if faults else None,
        down_s_per_hour=sum(repairs) / hours,
        down_s_max=max(repairs, default=None),
        mttr_s=sum(repairs) / len(repairs) if repairs else None,
        violations=len(result.violations),
        exposed=sum(outcome.exposed for outcome in result.outcomes) / arrived if arrived else None,
        redistributes_per_hour=kinds[Action.REDISTRIBUTE] / hours,
        resplits_per_hour=kinds[Action.RESPLIT] / hours,
        routes_per_hour=kinds[Action.ROUTES] / hours,
        kept_per_hour=kinds[Action.KEEP] / hours,
        aborts=result.aborts,
        moved_bytes=result.moved_bytes,
        planner_s=result.planner_s,
        gap=result.gap,
        phi=result.phi,
        phi_bound=result.phi_bound,
        transition_ms=latencies(in_transition(result), result.timeout_s),
        energy_j=sum(outcome.energy_j for outcome in result.outcomes) / done if done else None,
    )


def completed(outcome: Outcome, timeout_s: float) -> bool:
    """Whether it ended in output within the hard timeout."""
    last_s = outcome.last_s
    return outcome.error is None and last_s is not None and last_s - outcome.arrival.at_s <= timeout_s


def met(outcome: Outcome, slo: Slo, timeout_s: float) -> bool:
    """QoS compliance: "requests meeting *all* their class's SLOs / **all arrived**". Of a class that promises nothing
    it takes completion alone."""
    if not completed(outcome, timeout_s):
        return False
    held_to = (
        (ttft_ms(outcome, timeout_s), slo.ttft_ms),
        (tpot_ms(outcome, timeout_s) or 0.0, slo.tpot_ms),
        (latency_ms(outcome, timeout_s), slo.deadline_ms),
    )
    return all(target is None or ms <= target for ms, target in held_to)


def latency_ms(outcome: Outcome, timeout_s: float) -> float:
    """Latency: "client arrival to last token". "Rejected, failed or unfinished = the timeout value, never dropped":
    also what ended later than that, and likewise below."""
    if outcome.last_s is None or not completed(outcome, timeout_s):
        return timeout_s * 1e3
    return (outcome.last_s - outcome.arrival.at_s) * 1e3


def ttft_ms(outcome: Outcome, timeout_s: float) -> float:
    """From arrival to the first token; the timeout of all that did not complete, even of what had begun to answer."""
    if outcome.first_s is None or not completed(outcome, timeout_s):
        return latency_ms(outcome, timeout_s)
    return (outcome.first_s - outcome.arrival.at_s) * 1e3


def tpot_ms(outcome: Outcome, timeout_s: float) -> float | None:
    """Mean time per token after the first; the timeout of a request that was to have such tokens and did not complete,
    None of one that has none."""
    if outcome.first_s is None or outcome.last_s is None or not completed(outcome, timeout_s):
        return timeout_s * 1e3 if outcome.arrival.output_tokens > 1 else None
    return (outcome.last_s - outcome.first_s) * 1e3 / (outcome.tokens - 1) if outcome.tokens > 1 else None


def latencies(outcomes: Sequence[Outcome], timeout_s: float) -> Quantiles | None:
    return quantiles([latency_ms(outcome, timeout_s) for outcome in outcomes])


def ttfts(outcomes: Sequence[Outcome], timeout_s: float) -> Quantiles | None:
    return quantiles([ttft_ms(outcome, timeout_s) for outcome in outcomes])


def tpots(outcomes: Sequence[Outcome], timeout_s: float) -> Quantiles | None:
    return quantiles([ms for outcome in outcomes if (ms := tpot_ms(outcome, timeout_s)) is not None])


def quantiles(ms: Sequence[float]) -> Quantiles | None:
    """Mean, "p50/p95/p99", interpolated; None of nothing."""
    if not ms:
        return None
    p50, p95, p99 = np.percentile(ms, (50, 95, 99))
    return Quantiles(mean=float(np.mean(ms)), p50=float(p50), p95=float(p95), p99=float(p99))


def incidents(result: RunResult, outcomes: Sequence[Outcome]) -> tuple[Incident, ...]:
    """Downtime incidents of the class that `outcomes` are all of: "an interval >= 1 s in which >= 1 request arrives
    and none arriving completes within the hard timeout; merge gaps < 5 s".

    The interval is the longest there is, from the last arrival that completed to the next one that does. So a single
    request that fails among few is an incident, since nothing shows that others would have been served meanwhile.
    Repair is reckoned from the first that failed, since nothing shows that it was down before."""
    arrivals = sorted((outcome.arrival.at_s, completed(outcome, result.timeout_s)) for outcome in outcomes)
    found: list[Incident] = []
    since, down = result.begin_s, None
    for at_s, well in [*arrivals, (result.end_s, True)]:
        if not well:
            down = at_s if down is None else down
            continue
        if down is not None and at_s - since >= INCIDENT_S:
            found.append(Incident(since, down, at_s))
        since, down = at_s, None
    merged: list[Incident] = []
    for incident in found:
        if merged and incident.begin_s - merged[-1].end_s < MERGED_S:
            merged[-1] = Incident(merged[-1].begin_s, merged[-1].down_s, incident.end_s)
        else:
            merged.append(incident)
    return tuple(merged)


def actions(epochs: Sequence[Epoch]) -> list[tuple[Epoch, Action]]:
    """Every plan but the first, with what going there from the one before is called."""
    return [(after, action_between(before.placement, after.placement)) for before, after in pairwise(epochs)]


def in_transition(result: RunResult) -> list[Outcome]:
    """The requests under way at some time within 5 s of a change of plans (one that changes the placement)."""
    changes = np.asarray([e.begin_s for e, action in actions(result.epochs) if action is not Action.KEEP])
    begins = np.asarray([outcome.arrival.at_s for outcome in result.outcomes])
    ends = begins + np.asarray([latency_ms(outcome, result.timeout_s) for outcome in result.outcomes]) / 1e3
    counts = np.searchsorted(changes, ends + TRANSITION_S, "right") - np.searchsorted(changes, begins - TRANSITION_S)
    return [outcome for outcome, count in zip(result.outcomes, counts, strict=True) if count]


def jain(loads: Sequence[float]) -> float | None:
    """Jain index, (sum x)^2 / (n sum x^2): 1 if all hosting nodes are equally busy, 1/n if one alone is. None where
    none is."""
    squares = sum(load * load for load in loads)
    return sum(loads) ** 2 / (len(loads) * squares) if squares else None


def _share(seconds: Sequence[float], hosts: Sequence[NodeUse]) -> float | None:
    """Utilisation: "sum busy / sum (alive time x capacity); hosting nodes only". A node computes one thing at a time,
    so its capacity is one second per second."""
    alive_s = sum(node.alive_s for node in hosts)
    return sum(seconds) / alive_s if alive_s else None

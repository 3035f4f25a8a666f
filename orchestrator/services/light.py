"""PURE: how many instances of the light services there are and where, slot by slot (`mathematics.md`, B4).

Drift plus penalty: for each kind of task a debt grows by what was late and shrinks by what may be, and a frame of slots
is planned for the least of V times its cost plus each debt times what would be late,

    Z_m(t+1) = max(Z_m(t) + late_m(t) - eps_m arrived_m(t), 0)
    min over x   V (F sum keep x + sum deploy (x - x before)^+)  +  F sum_m max(Z_m, zeta) late_m(x)

by adding, dropping or moving one instance at a time while that helps, so that no search is longer than a slot. In any
run what was late is at most eps times what arrived, plus Z at its end.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from orchestrator.services.core import FAR_MS, Placed
from orchestrator.services.problem import SOURCE, Setting, Stream
from orchestrator.services.routing import Flows, Plan, Speeds, lacking, late, rerouted, routed, using
from schemas.base import NodeId

WIDTH = 4
"""Instances that are tried of each service that is in question: on the nodes nearest to who uses it."""
WANTED = 2
"""Services of which more is tried."""
TRIED = 24
"""Changes that are priced in a slot, at most: its time is bounded, and what is left comes in the next."""

Change = tuple[str, tuple[tuple[NodeId, int], ...]]
"""Of one service, by how much the instances on some nodes change."""


@dataclass(frozen=True)
class Steering:
    """What the controller weighs with."""

    allowed: Mapping[str, float]
    """By task: eps, the share of its requests that may be late."""
    cost_weight: float = 1.0
    """V: how many late requests a unit of cost is worth, at a debt of 1."""
    frame_slots: int = 20
    """F: for so long a change is made, and its cost is spread over it."""
    debt_floor: float = 1.0
    """zeta: what late requests weigh where nothing is owed."""
    tried: int = TRIED


@dataclass(frozen=True)
class Steered:
    """What the controller wants from now on."""

    plan: Plan
    late: Mapping[Stream, float]
    """By stream: the probability that a request is late."""
    cost: float
    """Of a slot, what was deployed anew spread over a frame."""
    score: float
    """What was made small, for one slot."""
    tried: int
    """Changes that were priced."""


def owed(
    debts: Mapping[str, float], allowed: Mapping[str, float], arrived: Mapping[str, int], missed: Mapping[str, int]
) -> dict[str, float]:
    """Z after a slot in which so many requests of each task arrived and so many were found late."""
    return {
        task: max(debts.get(task, 0.0) + missed.get(task, 0) - share * arrived.get(task, 0), 0.0)
        for task, share in allowed.items()
    }


def steer(
    setting: Setting, speeds: Speeds, steering: Steering, debts: Mapping[str, float], core: Placed, before: Placed
) -> Steered:
    """The light instances of the next frame, with what each stream takes; `before` are those of now.

    `setting.streams` says what arrives. Deterministic; never worse, by its own score, than leaving all as it is.
    """
    pricing = _Pricing(setting, speeds, steering, debts, before)
    best, tried = pricing.whole({**core, **before}), 0
    while tried < steering.tried:
        better = best
        for change in _changes(setting, best, pricing.weights):
            if tried == steering.tried:
                break
            tried += 1
            found = pricing.changed(best, change)
            if found.score < better.score:
                better = found
        if better is best:
            break
        best = better
    return Steered(best.plan, best.late, best.cost, best.score, tried)


@dataclass(frozen=True)
class _Priced:
    plan: Plan
    late: Mapping[Stream, float]
    lacks: Mapping[Stream, Mapping[str, float]]
    """Of the streams that are never done: why."""
    cost: float
    score: float


class _Pricing:
    """What a plan costs in the mean slot of a frame."""

    def __init__(
        self, setting: Setting, speeds: Speeds, steering: Steering, debts: Mapping[str, float], before: Placed
    ) -> None:
        self._setting, self._speeds, self._steering, self._before = setting, speeds, steering, before
        self.weights = {name: max(debts.get(name, 0.0), steering.debt_floor) for name in setting.tasks}

    def whole(self, placed: Placed) -> _Priced:
        """A plan of these instances, of which nothing is known."""
        return self._priced(routed(self._setting, placed, self._speeds), None)

    def changed(self, known: _Priced, change: Change) -> _Priced:
        """The same with some instances of one service more or less."""
        name, steps = change
        placed = dict(known.plan.placed)
        for node, step in steps:
            placed[node, name] = placed.get((node, name), 0) + step
            if not placed[node, name]:
                del placed[node, name]
        return self._priced(rerouted(self._setting, known.plan, placed, self._speeds, name), known)

    def _priced(self, plan: Plan, known: _Priced | None) -> _Priced:
        flows = plan.flows
        shares: dict[Stream, float] = {}
        lacks: dict[Stream, Mapping[str, float]] = {}
        for stream in self._setting.streams:
            if known is not None and not _touched(stream, plan, flows, known):
                shares[stream] = known.late[stream]
                if stream in known.lacks:
                    lacks[stream] = known.lacks[stream]
            elif lack := lacking(self._setting, plan, self._speeds, stream, flows):
                shares[stream], lacks[stream] = 1.0, lack
            else:
                shares[stream] = late(self._setting, plan, self._speeds, stream, flows)
        cost = 0.0
        for (node, name), count in plan.placed.items():
            kind = self._setting.services[name]
            if not kind.is_core:
                fresh = max(0, count - self._before.get((node, name), 0))
                cost += kind.keep_cost * count + kind.deploy_cost * fresh / self._steering.frame_slots
        # What takes several changes to work at all is better for each of them.
        missed = sum(
            self.weights[one.task] * one.per_slot * (share + sum(lacks.get(one, {}).values()))
            for one, share in shares.items()
        )
        return _Priced(plan, shares, lacks, cost, self._steering.cost_weight * cost + missed)


def _touched(stream: Stream, plan: Plan, flows: Flows, known: _Priced) -> bool:
    """Whether anything is other than it was where a stream goes."""
    route, before = plan.routes[stream], known.plan.flows
    return route != known.plan.routes[stream] or any(
        plan.placed.get((node, name)) != known.plan.placed.get((node, name))
        or flows.get((node, name)) != before.get((node, name))
        for name, node in route.items()
    )


def _changes(setting: Setting, best: _Priced, weights: Mapping[str, float]) -> Iterator[Change]:
    """What may help, the likeliest first: more of what late requests use, less of what little needs, one elsewhere."""
    free = _free(setting, best.plan.placed)
    for name in _wanted(setting, best, weights)[:WANTED]:
        for node in _nearest(setting, best.plan, name, free):
            yield name, ((node, 1),)
    flows = best.plan.flows
    idle = sorted(
        (flows.get(place, 0.0) / count, place)
        for place, count in best.plan.placed.items()
        if not setting.services[place[1]].is_core
    )
    for _, (node, name) in idle[:WIDTH]:
        yield name, ((node, -1),)
    for _, (node, name) in idle[:WIDTH]:
        for other in _nearest(setting, best.plan, name, free)[:1]:
            if other != node:
                yield name, ((node, -1), (other, 1))


def _wanted(setting: Setting, best: _Priced, weights: Mapping[str, float]) -> list[str]:
    """Light services by how much is late of what uses them: of what is never done, those alone that keep it."""
    found: dict[str, float] = {}
    for stream, share in best.late.items():
        parts = best.lacks.get(stream) or dict.fromkeys(setting.tasks[stream.task].after, share)
        for name, part in parts.items():
            if part > 0.0 and not setting.services[name].is_core:
                found[name] = found.get(name, 0.0) + weights[stream.task] * stream.per_slot * part
    return sorted(found, key=lambda name: (-found[name], name))


def _nearest(setting: Setting, plan: Plan, name: str, free: Mapping[NodeId, Mapping[str, float]]) -> list[NodeId]:
    """Nodes with room for one more, those first to which what it reads has the shortest way."""
    needs = {key: need for key, need in setting.services[name].needs.items() if need > 0.0}
    able = [
        node for node, left in free.items() if all(left.get(key, 0.0) + 1e-9 >= need for key, need in needs.items())
    ]
    read: dict[tuple[NodeId, float], float] = {}
    for stream in using(setting, name):
        task = setting.tasks[stream.task]
        for before in task.after[name]:
            much = task.input if before == SOURCE else setting.services[before].output
            place = (plan.routes[stream].get(before, stream.at), much)
            read[place] = read.get(place, 0.0) + stream.per_slot
    return sorted(able, key=lambda node: (_far(setting, read, node), node))[:WIDTH]


def _far(setting: Setting, read: Mapping[tuple[NodeId, float], float], node: NodeId) -> float:
    """What the way of what is read takes, over all requests of a slot."""
    ways = ((per_slot, setting.ways.ms(much, at, node)) for (at, much), per_slot in read.items())
    return sum(per_slot * (way_ms if isfinite(way_ms) else FAR_MS) for per_slot, way_ms in ways)


def _free(setting: Setting, placed: Placed) -> dict[NodeId, dict[str, float]]:
    """What is left of each node's resources."""
    left = {node: dict(host.has) for node, host in setting.hosts.items()}
    for (node, name), count in placed.items():
        for key, need in setting.services[name].needs.items():
            left[node][key] = left[node].get(key, 0.0) - count * need
    return left

"""PURE: how many instances of the light services there are and where, slot by slot (`mathematics.md`, B4).

Drift plus penalty: for each kind of task a debt grows by what was late and shrinks by what may be, and a frame of slots
is planned for the least of V times its cost plus each debt times what would be late,

    Z_m(t+1) = max(Z_m(t) + late_m(t) - eps_m arrived_m(t), 0)
    min over x   V (F sum keep x + sum deploy (x - x before)^+)  +  F sum_m max(Z_m, zeta) late_m(x)

by adding, dropping or moving one instance at a time, or by choosing anew between those that there are, while that
helps, so that no search is longer than a slot. In any run what was late is at most eps times what arrived, plus Z at
its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.services.changes import Change, changes
from orchestrator.services.core import Placed
from orchestrator.services.lateness import Outlook, Queues, Row, outlooks, queues
from orchestrator.services.problem import Setting, Stream
from orchestrator.services.routing import Known, Plan, Route, Speeds, counted, rerouted, routed, using

TRIED = 8
"""Changes that are priced in a slot, at most: its time is bounded, and what is left comes in the next."""


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

    placed: Placed
    """Instances of core and of light services."""
    routes: Mapping[Stream, Route]
    late: Mapping[Stream, float]
    """By stream: the probability that a request is late."""
    cost: float
    """Of a slot, what was deployed anew spread over a frame."""
    score: float
    """What was made small, for one slot."""
    tried: int
    """Changes that were priced."""

    @property
    def known(self) -> Known:
        """Where requests go, for the next slot."""
        return {(stream.task, stream.at, stream.part): route for stream, route in self.routes.items()}


def owed(
    debts: Mapping[str, float], allowed: Mapping[str, float], arrived: Mapping[str, int], missed: Mapping[str, int]
) -> dict[str, float]:
    """Z after a slot in which so many requests of each task arrived and so many were found late."""
    return {
        task: max(debts.get(task, 0.0) + missed.get(task, 0) - share * arrived.get(task, 0), 0.0)
        for task, share in allowed.items()
    }


def steer(
    setting: Setting,
    speeds: Speeds,
    steering: Steering,
    debts: Mapping[str, float],
    core: Placed,
    before: Placed,
    known: Known | None = None,
    turn: int = 0,
) -> Steered:
    """The light instances of the next frame, with what each stream takes; `before` are those of now, and `known` is
    where requests go now. `turn` is another in each slot, so that what there was no time for is tried in the next.

    `setting.streams` says what arrives. Deterministic; never worse, by its own score, than leaving all as it is.
    """
    pricing = _Pricing(setting, speeds, steering, debts, before)
    best, tried = pricing.whole({**core, **before}, known), 0
    while tried < steering.tried:
        found = changes(best.plan, best.outlooks, pricing.weights, turn, steering.tried - tried)
        tried += len(found)
        better = min(pricing.changed(best, found), key=lambda one: one.score, default=best)
        if better.score >= best.score:
            break
        best = better
    late = {stream: one.late for stream, one in best.outlooks.items()}
    return Steered(best.plan.placed, best.plan.routes, late, best.cost, best.score, tried)


@dataclass(frozen=True, eq=False)
class _Priced:
    plan: Plan
    queues: Queues
    outlooks: Mapping[Stream, Outlook]
    cost: float
    score: float


class _Pricing:
    """What plans cost in the mean slot of a frame."""

    def __init__(
        self, setting: Setting, speeds: Speeds, steering: Steering, debts: Mapping[str, float], before: Placed
    ) -> None:
        self._setting, self._speeds, self._steering = setting, speeds, steering
        self._before = counted(setting, before)
        self.weights = {name: max(debts.get(name, 0.0), steering.debt_floor) for name in setting.tasks}

    def whole(self, placed: Placed, known: Known | None) -> _Priced:
        """A plan of these instances."""
        plan = routed(self._setting, placed, self._speeds, known)
        at = queues(self._setting, plan, self._speeds, list(plan.flows))
        rows = [(stream, route, at) for stream, route in plan.routes.items()]
        return self._priced(plan, at, {}, rows, outlooks(self._setting, rows))

    def changed(self, known: _Priced, tried: Sequence[Change]) -> list[_Priced]:
        """The same with some instances of one service more or less, for each of what is tried: all are priced at
        once."""
        plans = [(plan := self._with(known.plan, one), self._queues(plan, known)) for one in tried]
        touched = [self._touched(plan, at, known, name) for (plan, at), (name, _) in zip(plans, tried, strict=True)]
        found = outlooks(self._setting, [row for rows in touched for row in rows])
        ends = np.cumsum([len(rows) for rows in touched])
        return [
            self._priced(plan, at, known.outlooks, rows, found[end - len(rows) : end])
            for (plan, at), rows, end in zip(plans, touched, ends, strict=True)
        ]

    def _with(self, plan: Plan, change: Change) -> Plan:
        name, steps = change
        counts = plan.counts[name].copy()
        for number, step in steps:
            counts[number] += step
        return rerouted(plan, name, counts, self._speeds)

    def _queues(self, plan: Plan, known: _Priced) -> Queues:
        other = [name for name, flows in plan.flows.items() if flows is not known.plan.flows[name]]
        return {**known.queues, **queues(self._setting, plan, self._speeds, other)}

    def _touched(self, plan: Plan, at: Queues, known: _Priced, name: str) -> list[Row]:
        """The streams for which something is other than it was."""
        users = set(using(self._setting, name))
        return [
            (stream, route, at)
            for stream, route in plan.routes.items()
            if stream in users or any(at[node, each] != known.queues.get((node, each)) for each, node in route.items())
        ]

    def _priced(
        self,
        plan: Plan,
        at: Queues,
        before: Mapping[Stream, Outlook],
        rows: Sequence[Row],
        found: Sequence[Outlook],
    ) -> _Priced:
        """What is not in a row is as it was before."""
        expected = {**before, **{row[0]: one for row, one in zip(rows, found, strict=True)}}
        cost = 0.0
        for name, counts in plan.counts.items():
            kind = self._setting.services[name]
            if not kind.is_core:
                fresh = np.maximum(counts - self._before[name], 0.0).sum()
                cost += float(kind.keep_cost * counts.sum() + kind.deploy_cost * fresh / self._steering.frame_slots)
        missed = sum(self.weights[one.task] * one.per_slot * outlook.badness for one, outlook in expected.items())
        return _Priced(plan, at, expected, cost, self._steering.cost_weight * cost + missed)

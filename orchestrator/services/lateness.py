"""PURE: how likely what comes of a plan is to be late (`mathematics.md`, B4).

How late a request is, is a distribution: waiting by effective capacity, added up along the path, and the latest where
paths meet. Streams of one task are reckoned at once, whatever the plans are that they belong to.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import ceil, log
from typing import NamedTuple

import numpy as np

from orchestrator.services.problem import SOURCE, Floats, Ints, Setting, Stream, TaskKind
from orchestrator.services.routing import Place, Plan, Route, Speeds
from profiler.delays import Delays, joined, none, waiting
from profiler.effective_capacity import STEADY_MAX, GammaService, PoissonJobs, Steady, tail

SLICES = 8
"""Of a slot, in any of which a request may come."""
GRID = 1.02
"""What comes to a service is taken for the next of steps of this ratio, so that most of what is asked is known."""


class Queue(NamedTuple):
    """What waits at a service on a node."""

    rho: float
    """What comes, of what is done on average."""
    waits: float
    """The probability that a request waits; 1 where more comes than is done."""
    ends_at: float
    """The rate at which waiting ends, per ms."""

    @property
    def keeps_up(self) -> bool:
        return self.rho < STEADY_MAX


Queues = Mapping[Place, Queue]
Row = tuple[Stream, Route, Queues]
"""A stream, where it goes, and what waits there."""


def queues(setting: Setting, plan: Plan, speeds: Speeds, names: Sequence[str]) -> Queues:
    """What waits at some services of a plan."""
    found = {}
    for name in names:
        flows, counts = plan.flows[name], plan.counts[name]
        for at in np.flatnonzero(flows > 0.0):
            service = speeds.of(name, float(counts[at] * setting.speeds[at]))
            found[setting.nodes[at], name] = queue_at(
                service, setting.services[name].work, _coarse(flows[at]), speeds.slot_ms
            )
    return found


def _coarse(flow: float) -> float:
    return float(GRID ** ceil(log(flow) / log(GRID) - 1e-9))


@lru_cache(maxsize=1 << 16)
def queue_at(service: Steady | GammaService, work: float, flow: float, slot_ms: float) -> Queue:
    """What waits where so many requests come in a slot. One waits where something is there before it, which of what
    comes one by one is the utilisation, or else where what is left of the slot is not enough for it."""
    jobs = PoissonJobs(flow, work)
    rho = jobs.mean / service.mean
    short = sum(service.short_of(work * SLICES / (slice + 0.5)) for slice in range(SLICES)) / SLICES
    found = tail(jobs, service, rho + (1.0 - rho) * short)
    return Queue(rho, 1.0, 1.0) if found is None else Queue(rho, *waiting(found, slot_ms))


class Outlook(NamedTuple):
    """What a stream has to expect."""

    late: float
    """The probability that a request misses its deadline."""
    lacks: Mapping[str, float]
    """By service: what keeps requests from ever being done, if anything does. Of the first that is nowhere, how many
    services they do not get to; of one that falls behind, the share that is never done."""

    @property
    def badness(self) -> float:
        """What takes several changes to work at all is better for each of them."""
        return self.late + sum(self.lacks.values())


def outlooks(setting: Setting, rows: Sequence[Row]) -> list[Outlook]:
    """Of each stream."""
    found = [Outlook(1.0, _lacking(setting, row)) for row in rows]
    by_task: dict[str, list[int]] = {}
    for number, (stream, _, _) in enumerate(rows):
        if not found[number].lacks:
            by_task.setdefault(stream.task, []).append(number)
    for task, numbers in by_task.items():
        shares = _late(setting, setting.tasks[task], [rows[number] for number in numbers])
        for number, share in zip(numbers, shares, strict=True):
            found[number] = Outlook(float(share), {})
    return found


def _lacking(setting: Setting, row: Row) -> Mapping[str, float]:
    stream, route, at = row
    found: dict[str, float] = {}
    for name in setting.tasks[stream.task].order:
        if name not in route:
            return {**found, name: float(len(setting.tasks[stream.task].order) - len(route))}
        if not (queue := at[route[name], name]).keeps_up:
            found[name] = max(0.0, 1.0 - 1.0 / queue.rho)
    return found


def _late(setting: Setting, task: TaskKind, rows: Sequence[Row]) -> Floats:
    table, number = setting.table, setting.numbers
    nodes: dict[str, Ints] = {SOURCE: np.array([number[stream.at] for stream, _, _ in rows])}
    done = {SOURCE: (np.zeros(len(rows)), none(len(rows)))}
    for name in task.order:
        kind = setting.services[name]
        nodes[name] = np.array([number[route[name]] for _, route, _ in rows])
        here = np.array([at[route[name], name] for _, route, at in rows])
        inputs = []
        for before in task.after[name]:
            data = setting.passed_on(task, before)
            least_ms, more = done[before]
            inputs.append((least_ms + table.ms(data, nodes[before], nodes[name]), more))
        least_ms, more = _joined(inputs)
        done[name] = least_ms + kind.mean_ms / setting.speeds[nodes[name]], more.then(here[:, 1], here[:, 2])
    least_ms, more = _joined([done[name] for name in task.last])
    counts = [len(stream.ages_ms) for stream, _, _ in rows]
    each = np.repeat(np.arange(len(rows)), counts)
    left_ms = task.deadline_ms - least_ms[each] - np.array([age for stream, _, _ in rows for age in stream.ages_ms])
    over = Delays(more.rates[each], more.shares[each]).over(np.maximum(left_ms, 0.0))
    return np.bincount(each, np.where(left_ms >= 0.0, over, 1.0)) / counts


def _joined(inputs: Sequence[tuple[Floats, Delays]]) -> tuple[Floats, Delays]:
    """When all are done, of which is known what each takes at least and what may come on top."""
    if len(inputs) == 1:
        return inputs[0]
    least_ms = np.maximum.reduce([least for least, _ in inputs])
    return least_ms, joined(more.before(least_ms - least) for least, more in inputs)

"""PURE: which node does each step of each stream of requests (`mathematics.md`, B4).

Each stream takes, service after service, the node over which a request is expected to be done first, what waits there
already and the way from there included, as long as that node keeps up.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isinf

import numpy as np

from orchestrator.services.ahead import left_ms
from orchestrator.services.core import Placed
from orchestrator.services.problem import Floats, ServiceKind, Setting, Stream
from profiler.effective_capacity import GammaService, Steady
from schemas.base import NodeId

FULL = 0.95
"""Of what an instance does on average, the share that streams may ask of it; beyond that one goes elsewhere."""

Place = tuple[NodeId, str]
"""A service on a node."""
Route = Mapping[str, NodeId]
"""By service of a task: where it is done."""
Known = Mapping[tuple[str, NodeId, int], Route]
"""By task, where it comes in and which part: where it went before."""
Counts = Mapping[str, Floats]
"""By service: instances of each node, in the order of `Setting.hosts`."""
Flows = Mapping[str, Floats]
"""By service: requests a slot, likewise."""
Ahead = Mapping[str, Mapping[str, Floats]]
"""By task and service: what there is to come from each node."""


@dataclass(frozen=True)
class Speeds:
    """How instances work."""

    slot_ms: float
    one: Mapping[str, Steady | GammaService]
    """By service: what one instance does, MB a slot."""

    def of(self, service: str, instances: float) -> Steady | GammaService:
        """So many instances on one node, which share what comes there; one on a node that is twice as fast is two."""
        return self.one[service].times(instances)

    def share(self, kind: ServiceKind) -> float:
        """Of what one instance does on average: what one request a slot asks."""
        return kind.work / self.one[kind.name].mean


@dataclass(frozen=True, eq=False)
class Plan:
    """Instances, and where each stream goes."""

    setting: Setting
    counts: Counts
    routes: dict[Stream, Route]
    """Of a stream for which a service is nowhere, as far as it gets."""
    flows: Flows

    @cached_property
    def placed(self) -> Placed:
        """The instances by name."""
        return {
            (self.setting.nodes[number], name): int(counts[number])
            for name, counts in self.counts.items()
            for number in np.flatnonzero(counts)
        }

    @cached_property
    def ahead(self) -> Ahead:
        """What there is to come from each node, of every task."""
        return ahead_of(self.setting, self.counts)


def ahead_of(setting: Setting, counts: Counts) -> Ahead:
    """What there is to come, of every task."""
    return {name: left_ms(setting, task, counts) for name, task in setting.tasks.items()}


def counted(setting: Setting, placed: Placed) -> Counts:
    """Instances as arrays."""
    number = setting.numbers
    found = {name: np.zeros(len(number)) for name in setting.services}
    for (node, name), count in placed.items():
        found[name][number[node]] = count
    return found


def routed(setting: Setting, placed: Placed, speeds: Speeds, known: Known | None = None) -> Plan:
    """Where each stream goes, the largest first. What is `known` of a route stays where there still is an instance that
    keeps up."""
    counts = counted(setting, placed)
    flows = {name: np.zeros(len(setting.hosts)) for name in setting.services}
    streams = by_size(setting.streams)
    kept = {
        one: _kept(setting, counts, speeds, flows, one, (known or {}).get((one.task, one.at, one.part), {}))
        for one in streams
    }
    plan = Plan(setting, counts, {}, flows)
    onward = {one: _onward(setting, counts, speeds, flows, plan.ahead, one, kept[one]) for one in streams}
    plan.routes.update(onward)
    return plan


def rerouted(plan: Plan, name: str, counts: Floats, speeds: Speeds) -> Plan:
    """The same plan with other instances of one service: the streams that use it choose anew where to have it, and
    those that were stopped for want of it go on from there."""
    setting, every = plan.setting, {**plan.counts, name: counts}
    streams = by_size(using(setting, name))
    later = {
        each
        for one in streams
        if len(plan.routes[one]) < len(setting.tasks[one.task].after)
        for each in setting.tasks[one.task].after
    }
    flows = {**plan.flows, **{each: plan.flows[each].copy() for each in later}, name: np.zeros_like(counts)}
    routes = dict(plan.routes)
    for stream in streams:
        known = {service: node for service, node in routes[stream].items() if service != name}
        routes[stream] = _onward(setting, every, speeds, flows, plan.ahead, stream, known)
    return Plan(setting, every, routes, flows)


def _kept(setting: Setting, counts: Counts, speeds: Speeds, flows: Flows, stream: Stream, known: Route) -> Route:
    """Of a route what can stay; what it adds to `flows` is in there afterwards."""
    route: dict[str, NodeId] = {}
    for name, node in known.items():
        at = setting.numbers.get(node)
        if at is None or not (count := counts[name][at]):
            continue
        flow = flows[name][at] + stream.per_slot
        if flow * speeds.share(setting.services[name]) < FULL * count * setting.speeds[at]:
            route[name], flows[name][at] = node, flow
    return route


def _onward(
    setting: Setting, counts: Counts, speeds: Speeds, flows: Flows, ahead: Ahead, stream: Stream, known: Route
) -> Route:
    """The route of a stream as far as it gets, `known` of it given; what it adds to `flows` is in there afterwards."""
    route = dict[str, NodeId]()
    for name in setting.tasks[stream.task].order:
        node = known.get(name)
        if node is None:
            asked = speeds.share(setting.services[name]) * (flows[name] + stream.per_slot)
            does = counts[name] * setting.speeds
            rho = np.divide(asked, does, out=np.full_like(asked, np.inf), where=does > 0.0)
            way_ms = ways_ms(setting, stream, route, name) + ahead[stream.task][name]
            best = best_host(way_ms, rho, speeds.slot_ms)
            if best is None:
                break
            node = setting.nodes[best]
            flows[name][best] += stream.per_slot
        route[name] = node
    for name, node in known.items():
        if name not in route:
            flows[name][setting.numbers[node]] -= stream.per_slot
    return route


def best_host(way_ms: Floats, rho: Floats, slot_ms: float) -> int | None:
    """The number of the node over which a request is done first, by how long the way over each is and by how busy it
    is then; where none keeps up, the one that falls behind least; None where none is reached."""
    busy = np.minimum(rho, FULL)
    done_ms = np.where(rho < FULL, way_ms + slot_ms * busy / (1.0 - busy), np.inf)
    best = int(done_ms.argmin())
    if not isinf(done_ms[best]):
        return best
    falls = np.where(np.isinf(way_ms), np.inf, rho)
    best = int(falls.argmin())
    return None if isinf(falls[best]) else best


def ways_ms(setting: Setting, stream: Stream, route: Route, name: str) -> Floats:
    """What it takes until all that a service waits for is at each node."""
    task = setting.tasks[stream.task]
    found = [
        setting.table.all_ms(
            setting.passed_on(task, before),
            setting.numbers[route.get(before, stream.at)],
        )
        for before in task.after[name]
    ]
    return found[0] if len(found) == 1 else np.maximum.reduce(found)


def using(setting: Setting, name: str) -> tuple[Stream, ...]:
    """The streams that use a service."""
    return tuple(stream for stream in setting.streams if name in setting.tasks[stream.task].after)


def by_size(streams: Iterable[Stream]) -> list[Stream]:
    """The largest first, always in the same order."""
    return sorted(streams, key=lambda stream: (-stream.per_slot, stream.task, stream.at, stream.part))

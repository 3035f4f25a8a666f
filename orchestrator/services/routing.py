"""PURE: which node does each step of each stream of requests, and how likely what comes of it is to be late
(`mathematics.md`, B4).

Each stream takes, service after service, the node where a request is expected to be done first, what waits there
already included, as long as that node keeps up. How late it is then is a distribution: waiting by effective capacity,
convolved along the path and multiplied at joins.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, isinf

import numpy as np

from orchestrator.services.core import Placed
from orchestrator.services.problem import SOURCE, Setting, Stream
from profiler.delays import Delays, joined, none, waiting
from profiler.effective_capacity import STEADY_MAX, GammaService, PoissonJobs, Steady, Tail, tail
from schemas.base import NodeId

FULL = 0.95
"""Of what an instance does on average, the share that streams may ask of it; beyond that one goes elsewhere."""
SLICES = 8
"""Of a slot, in any of which a request may come."""
CELLS = 256
"""Of a distribution: as many as reach to twice the deadline."""

Route = Mapping[str, NodeId]
"""By service of a task: where it is done."""
Flows = Mapping[tuple[NodeId, str], float]
"""By node and service: requests a slot."""


@dataclass(frozen=True)
class Speeds:
    """How instances work."""

    slot_ms: float
    one: Mapping[str, Steady | GammaService]
    """By service: what one instance does, MB a slot."""

    def of(self, service: str, instances: int) -> Steady | GammaService:
        """So many instances on one node, which share what comes there."""
        return self.one[service].times(instances)


@dataclass(frozen=True)
class Plan:
    """Instances, and where each stream goes."""

    placed: Placed
    """Of core and of light services."""
    routes: Mapping[Stream, Route]
    """Of a stream for which a service is nowhere, as far as it gets."""

    @cached_property
    def flows(self) -> Flows:
        """What comes to each service on each node."""
        found: dict[tuple[NodeId, str], float] = {}
        for stream, route in self.routes.items():
            for name, node in route.items():
                found[node, name] = found.get((node, name), 0.0) + stream.per_slot
        return found


def routed(setting: Setting, placed: Placed, speeds: Speeds) -> Plan:
    """Where each stream goes, the largest first."""
    flows: dict[tuple[NodeId, str], float] = {}
    hosts = hosts_of(placed)
    streams = by_size(setting.streams)
    return Plan(placed, {one: _onward(setting, placed, hosts, speeds, flows, one, {}) for one in streams})


def rerouted(setting: Setting, plan: Plan, placed: Placed, speeds: Speeds, name: str) -> Plan:
    """The same plan with other instances of one service: the streams that use it choose anew where to have it, and
    those that were stopped for want of it go on from there."""
    flows = {key: flow for key, flow in plan.flows.items() if key[1] != name}
    routes = dict(plan.routes)
    hosts = hosts_of(placed)
    for stream in by_size(using(setting, name)):
        known = {service: node for service, node in routes[stream].items() if service != name}
        routes[stream] = _onward(setting, placed, hosts, speeds, flows, stream, known)
    return Plan(placed, routes)


def _onward(
    setting: Setting,
    placed: Placed,
    hosts: Mapping[str, Iterable[NodeId]],
    speeds: Speeds,
    flows: dict[tuple[NodeId, str], float],
    stream: Stream,
    known: Route,
) -> Route:
    """The route of a stream as far as it gets, `known` of it given; what it adds to `flows` is in there afterwards."""
    route = dict[str, NodeId]()
    for name in setting.tasks[stream.task].order:
        node = known.get(name)
        if node is None:
            node = best_host(setting, placed, hosts.get(name, ()), speeds, flows, stream, route, name)
            if node is None:
                break
            flows[node, name] = flows.get((node, name), 0.0) + stream.per_slot
        route[name] = node
    for name, node in known.items():
        if name not in route:
            flows[node, name] -= stream.per_slot
    return route


def best_host(
    setting: Setting,
    placed: Placed,
    able: Iterable[NodeId],
    speeds: Speeds,
    flows: Flows,
    stream: Stream,
    route: Route,
    name: str,
) -> NodeId | None:
    """The node of `able` where this service is done first for a request of `stream`; where none keeps up, the one that
    falls behind least; None where none is reached."""
    kind, best = setting.services[name], None
    for node in able:
        way_ms = max(
            (_way_ms(setting, stream, route, before, node) for before in setting.tasks[stream.task].after[name]),
            default=0.0,
        )
        if isinf(way_ms):
            continue
        service = speeds.of(name, placed[node, name])
        flow = flows.get((node, name), 0.0) + stream.per_slot
        rho = flow * kind.work / service.mean
        done_ms = way_ms + speeds.slot_ms * rho / (1.0 - rho) if rho < FULL else inf
        found = (isinf(done_ms), done_ms if rho < FULL else rho, node)
        if best is None or found < best:
            best = found
    return None if best is None else best[2]


def lacking(setting: Setting, plan: Plan, speeds: Speeds, stream: Stream, flows: Flows) -> dict[str, float]:
    """By service: what keeps requests of `stream` from ever being done. Of the first that is nowhere, how many they do
    not get to; of one that falls behind, how many times as much comes as is done, less 1."""
    found: dict[str, float] = {}
    route = plan.routes[stream]
    for name in setting.tasks[stream.task].order:
        if name not in route:
            return {**found, name: float(len(setting.tasks[stream.task].order) - len(route))}
        does = speeds.of(name, plan.placed[route[name], name]).mean
        if (rho := flows[route[name], name] * setting.services[name].work / does) >= STEADY_MAX:
            found[name] = max(0.0, rho - 1.0)
    return found


def late(setting: Setting, plan: Plan, speeds: Speeds, stream: Stream, flows: Flows) -> float:
    """The probability that a request of `stream` misses its deadline; nothing of what it uses is `lacking`."""
    task, route = setting.tasks[stream.task], plan.routes[stream]
    step_ms = 2.0 * task.deadline_ms / CELLS
    done: dict[str, _Done] = {SOURCE: _Done(0.0, none(step_ms, CELLS))}
    for name in task.order:
        kind, node = setting.services[name], route[name]
        found = tail_at(PoissonJobs(flows[node, name], kind.work), speeds.of(name, plan.placed[node, name]))
        assert found is not None
        begun = _joined([done[one].behind(_way_ms(setting, stream, route, one, node)) for one in task.after[name]])
        done[name] = _Done(begun.least_ms + kind.mean_ms, begun.more.then(_waits(found, speeds.slot_ms, step_ms)))
    inner = {before for befores in task.after.values() for before in befores}
    last = _joined([done[name] for name in task.order if name not in inner])
    return last.more.over(task.deadline_ms - last.least_ms) if last.least_ms <= task.deadline_ms else 1.0


def using(setting: Setting, name: str) -> tuple[Stream, ...]:
    """The streams that use a service."""
    return tuple(stream for stream in setting.streams if name in setting.tasks[stream.task].after)


def by_size(streams: Iterable[Stream]) -> list[Stream]:
    """The largest first, always in the same order."""
    return sorted(streams, key=lambda stream: (-stream.per_slot, stream.task, stream.at))


def hosts_of(placed: Placed) -> dict[str, tuple[NodeId, ...]]:
    """By service: the nodes that have an instance."""
    found: dict[str, tuple[NodeId, ...]] = {}
    for (node, name), count in placed.items():
        if count > 0:
            found[name] = (*found.get(name, ()), node)
    return found


@lru_cache(maxsize=4096)
def tail_at(work: PoissonJobs, service: Steady | GammaService) -> Tail | None:
    """How waiting ends where so much comes. A request waits where something is there before it, which of what comes one
    by one is the utilisation, or else where what is left of the slot is not enough for it."""
    rho = min(1.0, work.mean / service.mean)
    lefts = (np.arange(SLICES) + 0.5) / SLICES
    short = sum(service.short_of(work.size / left) for left in lefts) / SLICES
    return tail(work, service, rho + (1.0 - rho) * short)


@lru_cache(maxsize=4096)
def _waits(found: Tail, slot_ms: float, step_ms: float) -> Delays:
    return waiting(found, slot_ms, step_ms, CELLS)


def _way_ms(setting: Setting, stream: Stream, route: Route, before: str, node: NodeId) -> float:
    if before == SOURCE:
        return setting.ways.ms(setting.tasks[stream.task].input, stream.at, node)
    return setting.ways.ms(setting.services[before].output, route[before], node)


@dataclass(frozen=True)
class _Done:
    """When something is done: what it takes at least, exactly, and what may come on top, on a grid."""

    least_ms: float
    more: Delays

    def behind(self, way_ms: float) -> "_Done":
        return _Done(self.least_ms + way_ms, self.more)


def _joined(inputs: Sequence[_Done]) -> _Done:
    """When all are done; there is one at least."""
    least_ms = max(one.least_ms for one in inputs)
    return _Done(least_ms, joined(one.more.before(least_ms - one.least_ms) for one in inputs))

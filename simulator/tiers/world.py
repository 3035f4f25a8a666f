"""A run: requests go through services, and whoever decides places instances and says where each step is done.

Times are milliseconds. Data takes its way at the rate of the way, however much else is on it, as in the paper: ways are
not shared. A request is on time if all that its task ends in is done by its deadline, the way from its user included.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from orchestrator.services.core import Placed
from orchestrator.services.problem import SOURCE, ServiceKind, TaskKind
from orchestrator.services.routing import Ahead, Place, ahead_of, counted
from profiler.effective_capacity import GammaService
from schemas.base import NodeId, Value
from simulator.draws import Draws
from simulator.kernel import Kernel
from simulator.tiers.drawn import Drawn, Request
from simulator.tiers.queues import Pool, SharedPool, SteadyPool


@dataclass(eq=False)
class Going:
    """A request under way."""

    request: Request
    task: TaskKind
    hosts: dict[str, NodeId] = field(default_factory=dict)
    """By service: where it is done."""
    inputs: dict[str, set[str]] = field(default_factory=dict)
    """By service: which of those that it waits for have come to its host."""
    done: set[str] = field(default_factory=set)
    done_ms: float | None = None

    @property
    def stream(self) -> tuple[str, NodeId]:
        return self.request.task, self.request.at


class Waiting(NamedTuple):
    """A step that has nowhere to be done: its input is at a node."""

    going: Going
    before: str
    at: NodeId
    service: str


@dataclass(frozen=True)
class Seen:
    """What is known at the beginning of a slot."""

    slot: int
    arrived: Mapping[tuple[str, NodeId], int]
    """By task and node: what came in since the last time."""
    missed: Mapping[str, int]
    """By task: what was found late since the last time."""
    light: Placed
    """Instances that are wanted now."""
    under_way: Sequence[Going]


class Contender(Protocol):
    """Who decides."""

    every_slots: int
    """How often it is asked."""

    @property
    def core(self) -> Placed:
        """Where the core services stay."""

    def slot(self, seen: Seen) -> Placed:
        """The light instances from now on."""

    def host(self, world: "TierWorld", going: Going, service: str, inputs: Mapping[str, NodeId]) -> NodeId | None:
        """Where a step is to be done whose inputs are at these nodes, as far as is known; None while it can wait."""


class Went(Value):
    """What came of a run."""

    arrived: dict[str, int]
    """By task, of requests that count."""
    on_time: dict[str, int]
    finished: int
    light_cost: float
    """A slot, of those that count."""
    core_cost: float
    deployed: int
    """Light instances made anew, of all slots that count."""
    decide_ms: float
    """Processor time of a decision, in the mean."""


class TierWorld:
    """One world under one contender."""

    def __init__(self, found: Drawn, sent: Sequence[Request], contender: Contender, seed: int) -> None:
        self.setting, self._speeds = found.setting, found.speeds
        self.kernel = Kernel()
        self.contender, self._draws = contender, Draws(seed)
        self._does: dict[tuple[Place, int], np.ndarray] = {}
        self.pools: dict[Place, Pool] = {}
        self._light: dict[Place, SharedPool] = {}
        self.hosts: dict[str, tuple[NodeId, ...]] = {}
        """By service: where it is taken."""
        self.ahead: Ahead = {}
        """What there is to come from each node, as instances are now."""
        self._waiting: list[Waiting] = []
        self._under_way: dict[int, Going] = {}
        self.all: list[Going] = []
        self._arrived: Counter[tuple[str, NodeId]] = Counter()
        self._missed: Counter[str] = Counter()
        for (node, name), count in contender.core.items():
            kind = self.setting.services[name]
            assert kind.is_core, f"{name} is light"
            self.pools[node, name] = self._core_pool(kind, node, count)
        for request in sent:
            self.kernel.at(request.sent_ms + request.age_ms, self._comes, request)

    def run(self, warmup_slots: int, slots: int, drain_slots: int) -> Went:
        """Through the warm-up and the slots that count; what is under way then may end."""
        slot_ms = self._speeds.slot_ms
        light_cost, deployed, decisions, spent = 0.0, 0, 0, 0.0
        for slot in range(warmup_slots + slots + drain_slots):
            self.kernel.run(slot * slot_ms)
            before = {place: pool.count for place, pool in self._light.items()}
            if slot % self.contender.every_slots == 0:
                began = time.process_time()
                wanted = self.contender.slot(self._seen(slot))
                spent, decisions = spent + time.process_time() - began, decisions + 1
                self._resize(wanted)
            if not warmup_slots <= slot < warmup_slots + slots:
                continue
            for (node, name), pool in self._light.items():
                kind, count = self.setting.services[name], pool.count
                fresh = max(0, count - before.get((node, name), 0))
                light_cost += kind.keep_cost * count + kind.deploy_cost * fresh
                deployed += fresh
        self.kernel.run((warmup_slots + slots + drain_slots) * slot_ms)
        end_ms = (warmup_slots + slots) * slot_ms
        counted = [one for one in self.all if warmup_slots * slot_ms <= one.request.sent_ms < end_ms]
        return Went(
            arrived=dict(Counter(one.request.task for one in counted)),
            on_time=dict(Counter(one.request.task for one in counted if self.is_on_time(one))),
            finished=sum(one.done_ms is not None for one in counted),
            light_cost=light_cost / slots,
            core_cost=self._core_cost(slots),
            deployed=deployed,
            decide_ms=1e3 * spent / decisions,
        )

    def is_on_time(self, going: Going) -> bool:
        return going.done_ms is not None and going.done_ms <= going.request.sent_ms + going.task.deadline_ms

    def _core_cost(self, slots: int) -> float:
        """A slot: of keeping them, and of making them once over the whole run."""
        kinds = ((self.setting.services[name], count) for (_, name), count in self.contender.core.items())
        return sum(count * (kind.keep_cost + kind.deploy_cost / slots) for kind, count in kinds)

    def _core_pool(self, kind: ServiceKind, node: NodeId, count: int) -> SteadyPool:
        return SteadyPool(self.kernel, count, kind.mean_ms, lambda job: self._done(job, kind.name, node))

    def _light_pool(self, node: NodeId, name: str) -> SharedPool:
        return SharedPool(
            self.kernel,
            self._speeds.slot_ms,
            self.setting.services[name].work,
            lambda number, slot: self._did((node, name), number, slot),
            lambda job: self._done(job, name, node),
        )

    def _seen(self, slot: int) -> Seen:
        light = {place: pool.wanted for place, pool in self._light.items() if pool.wanted}
        found = Seen(slot, Counter(self._arrived), Counter(self._missed), light, tuple(self._under_way.values()))
        self._arrived.clear()
        self._missed.clear()
        return found

    def _resize(self, wanted: Placed) -> None:
        for place in sorted(wanted.keys() - self._light.keys()):
            self._light[place] = self.pools[place] = self._light_pool(*place)
        for place, pool in self._light.items():
            pool.resize(wanted.get(place, 0))
        hosts: dict[str, tuple[NodeId, ...]] = {}
        for node, name in self.pools:
            if (node, name) not in self._light or self._light[node, name].wanted:
                hosts[name] = (*hosts.get(name, ()), node)
        self.hosts = hosts
        self.ahead = ahead_of(
            self.setting,
            counted(self.setting, {place: 1 for place in self.pools if place[0] in hosts.get(place[1], ())}),
        )
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            self._send(*one)

    def _did(self, place: Place, number: int, slot: int) -> float:
        """What an instance does in a slot, MB: by the seed and its place alone."""
        drawn = self._does.get((place, number))
        if drawn is None or slot >= len(drawn):
            speed = self._speeds.one[place[1]]
            assert isinstance(speed, GammaService)
            rng = self._draws.stream(f"rates of {place} {number}")
            drawn = rng.gamma(speed.shape, speed.scale, max(1024, 1 << (slot + 1).bit_length()))
            self._does[place, number] = drawn
        return float(drawn[slot])

    def _comes(self, request: Request) -> None:
        going = Going(request, self.setting.tasks[request.task])
        self.all.append(going)
        self._under_way[request.number] = going
        self._arrived[going.stream] += 1
        self.kernel.at(request.sent_ms + going.task.deadline_ms, self._due, going)
        self._on(going, SOURCE, request.at)

    def _due(self, going: Going) -> None:
        if going.done_ms is None:
            self._missed[going.request.task] += 1

    def _on(self, going: Going, before: str, at: NodeId) -> None:
        """Send what a service passes on to all that wait for it."""
        for service, befores in going.task.after.items():
            if before in befores:
                self._send(going, before, at, service)

    def _send(self, going: Going, before: str, at: NodeId, service: str) -> None:
        host = going.hosts.get(service)
        if host is None or host not in self.hosts.get(service, ()):
            if service not in self.hosts:
                self._waiting.append(Waiting(going, before, at, service))
                return
            inputs = {each: going.hosts[each] for each in going.task.after[service] if each in going.hosts}
            host = self.contender.host(self, going, service, {**inputs, before: at})
            if host is None:
                self._waiting.append(Waiting(going, before, at, service))
                return
            going.hosts[service] = host
        data = self.setting.passed_on(going.task, before)
        self.kernel.after(self.setting.ways.ms(data, at, host), self._gets, going, before, service, host)

    def _gets(self, going: Going, before: str, service: str, host: NodeId) -> None:
        if going.hosts.get(service) != host:
            self._send(going, before, host, service)
            return
        came = going.inputs.setdefault(service, set())
        came.add(before)
        if host not in self.hosts.get(service, ()):
            # What it was sent to is gone: on from there, with all that has come.
            del going.hosts[service], going.inputs[service]
            for one in sorted(came):
                self._send(going, one, host, service)
        elif len(came) == len(going.task.after[service]):
            self.pools[host, service].put(going)

    def _done(self, job: object, service: str, node: NodeId) -> None:
        assert isinstance(job, Going)
        job.done.add(service)
        if job.done.issuperset(job.task.last):
            job.done_ms = self.kernel.now
            del self._under_way[job.request.number]
        else:
            self._on(job, service, node)

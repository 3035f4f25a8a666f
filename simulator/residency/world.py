"""A run: requests come, servers load models from their disks and fetch them from the cloud, and whoever decides says
what is to lie where and what goes first where room is short.

A request goes where it is done at the least cost as far as can be seen: a server that has its model in memory, or has
to load it first, or the cloud. A model that is in use is never taken away. Files come to a server one after another at
the rate of its backhaul, and blocks are loaded one model after another.
"""

import time
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from orchestrator.residency.memory import Memory, Rule, leaving
from orchestrator.residency.problem import Floats, Lying
from schemas.base import Value
from simulator.kernel import Kernel
from simulator.residency.drawn import Drawn, Request
from simulator.residency.scenario import ResidencyScenario


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known when it is decided."""

    now_s: float
    arrived: Floats
    """[callers, models]: what was asked since the last time."""
    seconds: float
    lying: Lying
    of_disks: bool
    """Whether it is the turn of the disks."""


@dataclass(frozen=True)
class Targets:
    """What is to be, by server and model."""

    stored: Mapping[int, tuple[int, ...]] | None = None
    """What else lies there may go. None: as it is."""
    resident: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """What is loaded ahead of need where there is room, the first first."""


class Keeper(Protocol):
    """Who decides."""

    rule: Rule
    """Who leaves a memory first."""
    uses_servers: bool
    """Or the cloud alone."""
    loads: bool
    """Whether a model for which a caller went to the cloud is loaded, if it lies on its server's disk,"""
    admits: bool
    """and is fetched there if it does not, as a cache does: in the place of others."""

    def look(self, seen: Seen) -> Targets:
        """What is to be from now on."""


@dataclass(eq=False)
class Going:
    """A request on a server."""

    request: Request
    work_s: float
    stalled: bool


class Site:
    """One server, as a run goes."""

    def __init__(self, models: int) -> None:
        self.stored: set[int] = set()
        self.resident: set[int] = set()
        """Loaded, or being loaded: their room is taken."""
        self.loading: dict[int, float] = {}
        """When they will be ready."""
        self.in_use = [0] * models
        """Requests of each model that are here."""
        self.queue: deque[Going] = deque()
        self.running = 0
        self.pending_s = 0.0
        """Work of all that is here."""
        self.loader_free_s = 0.0
        self.fetching: deque[int] = deque()
        self.wanted: tuple[int, ...] = ()
        """What is to be on the disk, the first first,"""
        self.ahead: tuple[int, ...] = ()
        """and what in memory."""
        self.memory: Memory[str] = Memory()
        self.disk: Memory[str] = Memory()


class Went(Value):
    """What came of the part of a run that counts."""

    asked: int
    latency_s: float
    """Mean."""
    latency_p95_s: float
    stalls: int
    """Requests that waited for their model to be loaded."""
    from_memory: int
    """That did not, on a server."""
    cloud: int
    serving: float
    """Of all requests: waiting, and what the cloud costs."""
    keeping: float
    """Of what lay on disks and in memory."""
    energy: float
    switching: float
    """Of fetching and loading."""
    fetched_gb: float
    loaded_gb: float
    evicted_in_use: int
    """Models that left while they were needed: 0."""
    decide_s: float
    """Processor time of a decision about disks, in the mean."""


class ResidencyWorld:
    """One world under one keeper."""

    def __init__(self, scenario: ResidencyScenario, found: Drawn, asked: tuple[Request, ...], keeper: Keeper) -> None:
        self._scenario, self._found, self._keeper = scenario, found, keeper
        self._kernel = Kernel()
        self.sites = [Site(len(found.models)) for _ in found.servers]
        self._pieces = [frozenset(model.pieces) for model in found.models]
        shape = (len(found.models), len(found.servers))
        self._ready = np.full(shape, np.inf)
        """When a model in memory can be used; infinite where it is not there,"""
        self._is_stored = np.zeros(shape, bool)
        """and whether it could be loaded."""
        self._work = np.array([[m.work_s / s.speed for s in found.servers] for m in found.models])
        watts = np.array([server.watts for server in found.servers])
        self._energy = self._work * watts[None, :] * found.prices.joule
        self._at_once = np.array([server.at_once for server in found.servers])
        self._pending = np.zeros(len(found.servers))
        self._loader = np.zeros(len(found.servers))
        self._arrived = np.zeros((len(found.servers), len(found.models)))
        self._looked_s = 0.0
        self._latencies: list[float] = []
        self._went: dict[str, float] = dict.fromkeys(Went.model_fields, 0.0)
        self._kept_at = np.zeros(len(found.servers))
        for request in asked:
            self._kernel.at(request.at_s, self._comes, request)

    def run(self) -> Went:
        """All of it."""
        end_s = self._scenario.warmup_s + self._scenario.duration_s
        turns = round(self._scenario.disk_s / self._scenario.memory_s)
        spent, decisions, turn, at_s = 0.0, 0, 0, 0.0
        while at_s < end_s:
            self._kernel.run(at_s)
            of_disks = turn % max(1, turns) == 0
            began = time.process_time()
            self._look(of_disks)
            if of_disks:
                spent, decisions = spent + time.process_time() - began, decisions + 1
            turn, at_s = turn + 1, at_s + self._scenario.memory_s
        self._kernel.run(end_s)
        for number in range(len(self.sites)):
            self._settle(number)
        self._kernel.run(end_s + 3600.0)
        asked = len(self._latencies)
        whole = {"asked": asked, "decide_s": spent / max(1, decisions)}
        whole |= {"latency_s": float(np.mean(self._latencies)) if asked else 0.0}
        whole |= {"latency_p95_s": float(np.quantile(self._latencies, 0.95)) if asked else 0.0}
        found: dict[str, float] = self._went | whole
        counts = {"asked", "stalls", "from_memory", "cloud", "evicted_in_use"}
        return Went(**{name: int(value) if name in counts else value for name, value in found.items()})

    @property
    def lying(self) -> Lying:
        stored, resident = set(), set()
        for server, site in zip(self._found.servers, self.sites, strict=True):
            name = server.box.name
            stored |= {(name, piece) for model in site.stored for piece in self._pieces[model]}
            resident |= {(name, piece) for model in site.resident for piece in self._pieces[model]}
        return Lying(frozenset(stored), frozenset(resident))

    def _counts(self, at_s: float) -> bool:
        return self._scenario.warmup_s <= at_s < self._scenario.warmup_s + self._scenario.duration_s

    def _look(self, of_disks: bool) -> None:
        now = self._kernel.now
        seen = Seen(now, self._arrived, max(now - self._looked_s, 1e-9), self.lying, of_disks)
        targets = self._keeper.look(seen)
        self._arrived, self._looked_s = np.zeros_like(self._arrived), now
        if targets.stored is not None:
            for number, site in enumerate(self.sites):
                site.wanted = targets.stored.get(number, ())
                for model in sorted(site.stored - set(site.wanted)):
                    self._remove(number, model)
                self._fetch(number)
        for number, models in targets.resident.items():
            self.sites[number].ahead = models
            self._go_ahead(number)

    # requests

    def _comes(self, request: Request) -> None:
        self._arrived[request.caller, request.model] += 1
        self._send(request, set())

    def _send(self, request: Request, full: Set[int]) -> None:
        """To where it costs least; `full` have no room for its model."""
        now, found, model = self._kernel.now, self._found, request.model
        work = self._work[model] * request.factor
        cloud = found.cloud_s[request.caller] + found.models[model].work_s * request.factor / found.cloud_speed
        dear = cloud + found.models[model].cloud_price
        if self._keeper.uses_servers:
            ready = self._ready[model]
            loads = np.maximum(self._loader - now, 0.0) + found.load_s[model]
            waits = np.where(
                np.isfinite(ready), np.maximum(ready - now, 0.0), np.where(self._is_stored[model], loads, np.inf)
            )
            waits += self._pending / self._at_once
            costs = found.net_s[request.caller] + waits + work + self._energy[model] * request.factor
            costs[list(full)] = np.inf
            best = int(costs.argmin())
            if costs[best] < dear:
                if np.isfinite(ready[best]) or self._load(best, model):
                    self._take(best, request, float(work[best]))
                else:
                    self._send(request, {*full, best})
                return
        self._note(request, cloud, dear)
        if self._counts(request.at_s):
            self._went["cloud"] += 1
        if self._keeper.loads and self.sites[request.caller].stored >= {model}:
            self._load(request.caller, model)
        elif self._keeper.admits:
            self._admit(request.caller, model)

    def _take(self, number: int, request: Request, work_s: float) -> None:
        site, model, now = self.sites[number], request.model, self._kernel.now
        site.in_use[model] += 1
        self._pending[number] += work_s
        ready = float(self._ready[model, number])
        self._used(number, model)
        going = Going(request, work_s, ready > now)
        if ready > now:
            self._kernel.at(ready, self._queue, number, going)
        else:
            self._queue(number, going)

    def _queue(self, number: int, going: Going) -> None:
        self.sites[number].queue.append(going)
        self._next(number)

    def _next(self, number: int) -> None:
        site = self.sites[number]
        while site.queue and site.running < self._at_once[number]:
            going = site.queue.popleft()
            site.running += 1
            self._kernel.after(going.work_s, self._done, number, going)

    def _done(self, number: int, going: Going) -> None:
        site, request = self.sites[number], going.request
        site.running -= 1
        site.in_use[request.model] -= 1
        self._pending[number] -= going.work_s
        latency = self._kernel.now - request.at_s + float(self._found.net_s[request.caller, number])
        self._note(request, latency, latency)
        if self._counts(request.at_s):
            self._went["stalls" if going.stalled else "from_memory"] += 1
            self._went["energy"] += going.work_s * self._found.servers[number].watts * self._found.prices.joule
        self._next(number)

    def _note(self, request: Request, latency_s: float, cost: float) -> None:
        if self._counts(request.at_s):
            self._latencies.append(latency_s)
            self._went["serving"] += cost

    # memories

    def _load(self, number: int, model: int, ahead: Set[int] | None = None) -> bool:
        """Have a model in memory, in the place of what is worth least there; `ahead` of need only if the loader is
        idle, and in no place of others that are wanted. Whether it is, or will be."""
        site, now = self.sites[number], self._kernel.now
        if model in site.resident:
            return True
        if model not in site.stored or (ahead is not None and site.loader_free_s > now):
            return False
        room = self._found.servers[number].box.memory_bytes
        kept = {each for each in site.resident if site.in_use[each] or each in site.loading}
        if ahead is not None:
            kept |= ahead & site.resident

        def enough(gone: Set[str]) -> bool:
            left = {each for each in site.resident if str(each) not in gone}
            return self._memory_bytes(left | {model}) <= room

        held, staying = [str(each) for each in site.resident], [str(each) for each in kept]
        gone = leaving(site.memory, held, self._keeper.rule, enough, staying)
        if gone is None:
            return False
        for key in gone:
            self._unload(number, int(key))
        site.memory = site.memory.without(gone)
        lacks = self._pieces[model] - self._held(site.resident)
        took = self._found.loading_s(self._found.servers[number], tuple(lacks))
        ready = max(now, site.loader_free_s) + took
        self._settle(number)
        site.resident.add(model)
        site.loading[model] = ready
        site.loader_free_s = self._loader[number] = ready
        self._ready[model, number] = ready
        self._kernel.at(ready, self._loaded, number, model)
        if self._counts(now):
            self._went["switching"] += took * self._found.prices.loading
            self._went["loaded_gb"] += sum(self._found.pieces[piece].memory_bytes for piece in lacks) / 1e9
        if ahead is not None:
            self._used(number, model)
        return True

    def _loaded(self, number: int, model: int) -> None:
        self.sites[number].loading.pop(model, None)
        self._go_ahead(number)

    def _go_ahead(self, number: int) -> None:
        """Load the next of what is to be in memory, nobody having asked for it."""
        site = self.sites[number]
        for model in site.ahead:
            if model not in site.resident and self._load(number, model, ahead=set(site.ahead)):
                return

    def _unload(self, number: int, model: int) -> None:
        site = self.sites[number]
        self._settle(number)
        if site.in_use[model]:
            self._went["evicted_in_use"] += 1
        site.resident.discard(model)
        self._ready[model, number] = np.inf

    def _used(self, number: int, model: int) -> None:
        size = self._memory_bytes({model})
        load_s = float(self._found.load_s[model, number])
        site = self.sites[number]
        site.memory = site.memory.use(str(model), load_s, size, self._kernel.now)
        site.disk = site.disk.use(str(model), load_s, size, self._kernel.now)

    # disks

    def _admit(self, number: int, model: int) -> None:
        """Fetch a model to a server in the place of others, as a cache does."""
        site = self.sites[number]
        if model in site.stored or model in site.wanted:
            return
        room = self._found.servers[number].box.disk_bytes
        kept = {each for each in site.stored if site.in_use[each] or each in site.loading} | set(site.fetching)

        def enough(gone: Set[str]) -> bool:
            left = {each for each in site.stored | set(site.wanted) if str(each) not in gone}
            return self._disk_bytes(left | {model}) <= room

        held, staying = [str(each) for each in site.stored], [str(each) for each in kept]
        gone = leaving(site.disk, held, self._keeper.rule, enough, staying)
        if gone is None:
            return
        for key in gone:
            self._remove(number, int(key))
        site.disk = site.disk.without(gone)
        left = tuple(each for each in site.wanted if str(each) not in gone)
        site.wanted = (*left, model)
        site.disk = site.disk.use(str(model), float(self._found.load_s[model, number]), 1.0, self._kernel.now)
        self._fetch(number)

    def _fetch(self, number: int) -> None:
        """Bring what is wanted and fits, one model after another."""
        site = self.sites[number]
        if site.fetching:
            return
        for model in site.wanted:
            if (
                model in site.stored
                or self._disk_bytes(site.stored | {model}) > self._found.servers[number].box.disk_bytes
            ):
                continue
            lacks = self._pieces[model] - self._held(site.stored)
            size = sum(self._found.pieces[piece].disk_bytes for piece in lacks)
            took = size / self._found.servers[number].box.fetch_bytes_per_s
            site.fetching.append(model)
            self._kernel.after(took, self._fetched, number, model, size, took)
            return

    def _fetched(self, number: int, model: int, size: float, took_s: float) -> None:
        site = self.sites[number]
        site.fetching.clear()
        self._settle(number)
        if self._disk_bytes(site.stored | {model}) <= self._found.servers[number].box.disk_bytes:
            site.stored.add(model)
            self._is_stored[model, number] = True
        if self._counts(self._kernel.now):
            self._went["switching"] += took_s * self._found.prices.fetching
            self._went["fetched_gb"] += size / 1e9
        self._fetch(number)
        self._go_ahead(number)

    def _remove(self, number: int, model: int) -> None:
        """From the disk, unless it is in use."""
        site = self.sites[number]
        if site.in_use[model] or model in site.loading:
            return
        self._settle(number)
        if model in site.resident:
            self._unload(number, model)
        site.stored.discard(model)
        self._is_stored[model, number] = False

    # books

    def _held(self, models: Set[int]) -> frozenset[str]:
        return frozenset[str]().union(*(self._pieces[model] for model in models))

    def _memory_bytes(self, models: Set[int]) -> float:
        return sum(self._found.pieces[piece].memory_bytes for piece in self._held(models))

    def _disk_bytes(self, models: Set[int]) -> float:
        return sum(self._found.pieces[piece].disk_bytes for piece in self._held(models))

    def _settle(self, number: int) -> None:
        """Charge what lay on a server since it was charged last."""
        site, prices, start = self.sites[number], self._found.prices, self._scenario.warmup_s
        end = start + self._scenario.duration_s
        since, now = (min(max(at, start), end) for at in (float(self._kept_at[number]), self._kernel.now))
        each = prices.disk * self._disk_bytes(site.stored) + prices.memory * self._memory_bytes(site.resident)
        self._went["keeping"] += each * (now - since)
        self._kept_at[number] = self._kernel.now

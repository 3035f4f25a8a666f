"""Who decides in a world of many models: what the product does, and what it is held against."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from orchestrator.residency import genetic, greedy, program
from orchestrator.residency.memory import Rule, greedy_dual, least_frequent, least_recent
from orchestrator.residency.popularity import Popularity
from orchestrator.residency.problem import Floats, Lying, Setting
from orchestrator.residency.renting import Ledger, Term, renewed, to_drop, to_fetch
from simulator.residency.drawn import Drawn, rates
from simulator.residency.scenario import ResidencyScenario
from simulator.residency.world import Keeper, Seen, Targets

PAID_BACK_S = 900.0
"""In which what is changed is to be paid back."""
SOLVED_S = 5.0
"""For the integer program, at each turn of the disks."""


class Planned:
    """Decides what lies where for the rates that it expects, at each turn of the disks; memories follow at once, and in
    between whoever is worth least for its room leaves."""

    uses_servers, loads, admits = True, False, False
    rule: Rule = staticmethod(greedy_dual)

    def __init__(self, scenario: ResidencyScenario, found: Drawn, seed: int) -> None:
        self._scenario, self._found, self._seed = scenario, found, seed
        self._popularity = Popularity.unheard(len(found.servers), len(found.models))

    def look(self, seen: Seen) -> Targets:
        self._popularity = self._popularity.after(seen.arrived, seen.seconds)
        if not seen.of_disks:
            return Targets()
        return targets(self._found, self.placed(self.setting(seen)))

    def expected(self, seen: Seen) -> Floats:
        """How often each model is asked for, [callers, models]."""
        return self._popularity.rates

    def setting(self, seen: Seen) -> Setting:
        return self._found.setting(self.expected(seen), seen.lying, PAID_BACK_S)

    def placed(self, setting: Setting) -> Lying:
        return greedy.place(setting)


class Program(Planned):
    """The same by an integer program, solved for some seconds."""

    def placed(self, setting: Setting) -> Lying:
        return program.place(setting, SOLVED_S).lying


class Genetic(Planned):
    """The same, bred: the paper's way."""

    def placed(self, setting: Setting) -> Lying:
        return genetic.place(setting, self._seed)


class SwitchingBlind(Planned):
    """The same as if changes cost nothing."""

    def setting(self, seen: Seen) -> Setting:
        return self._found.setting(self.expected(seen))


class StorageOnly(Planned):
    """The same as if everything on a disk were in memory; what is loaded is left to who asks."""

    loads = True

    def placed(self, setting: Setting) -> Lying:
        boxes = tuple(replace(box, memory_bytes=float("inf")) for box in setting.boxes)
        lying = greedy.place(replace(setting, boxes=boxes, prices=replace(setting.prices, memory=0.0, loading=0.0)))
        return replace(lying, resident=frozenset())


class Clairvoyant(Planned):
    """The same, told how often each model will be asked for until what is changed now is paid back."""

    def __init__(self, scenario: ResidencyScenario, found: Drawn, seed: int) -> None:
        super().__init__(scenario, found, seed)
        self._rates = rates(scenario, found, seed)

    def expected(self, seen: Seen) -> Floats:
        starts = [at_s for at_s, _ in self._rates]
        ends, until = [*starts[1:], inf], seen.now_s + PAID_BACK_S
        spans = [max(0.0, min(until, end) - max(seen.now_s, start)) for start, end in zip(starts, ends, strict=True)]
        told = np.array([rate for _, rate in self._rates])
        return np.asarray(np.tensordot(np.array(spans) / PAID_BACK_S, told, axes=1))


class Retro:
    """Hosts what hosting would have paid for, by what was asked; memories as they are used."""

    uses_servers, loads, admits = True, True, False
    rule: Rule = staticmethod(greedy_dual)

    def __init__(self, scenario: ResidencyScenario, found: Drawn, seed: int) -> None:
        self._found = found
        self._ledger: Ledger[tuple[int, int]] = Ledger()

    def look(self, seen: Seen) -> Targets:
        terms = self._terms(seen)
        there = frozenset(
            (model, server) for server, models in _stored(self._found, seen.lying).items() for model in models
        )
        self._ledger = renewed(self._ledger, terms, there)
        leaving = set(to_drop(self._ledger, terms))
        kept: dict[int, list[int]] = {}
        for model, server in sorted(there - leaving):
            kept.setdefault(server, []).append(model)
        for model, server in to_fetch(self._ledger, terms):
            kept.setdefault(server, []).append(model)
        return Targets(stored={server: tuple(models) for server, models in kept.items()})

    def _terms(self, seen: Seen) -> dict[tuple[int, int], Term]:
        """Of each model on each server, over the last time, beside the best of the others that have it."""
        found, terms = self._found, {}
        stored = _stored(found, seen.lying)
        for number, model in enumerate(found.models):
            asked = seen.arrived[:, number]
            work = np.array([model.work_s / server.speed for server in found.servers])
            costs = found.net_s + work[None, :]
            has = [server for server in range(len(found.servers)) if number in stored.get(server, ())]
            for server, one in enumerate(found.servers):
                others = [other for other in has if other != server]
                now = np.minimum(found.absent[:, number], costs[:, others].min(axis=1, initial=np.inf))
                saved = float(asked @ np.maximum(0.0, now - costs[:, server]))
                size = sum(found.pieces[piece].disk_bytes for piece in model.pieces)
                memory = sum(found.pieces[piece].memory_bytes for piece in model.pieces)
                rent = seen.seconds * (found.prices.disk * size + found.prices.memory * memory)
                fetch = found.prices.fetching * size / one.box.fetch_bytes_per_s
                fetch += found.prices.loading * found.load_s[number, server]
                terms[number, server] = Term(saved, rent, fetch)
        return terms


class CloudOnly:
    """Everything in the cloud."""

    uses_servers, loads, admits = False, False, False
    rule: Rule = staticmethod(least_recent)

    def __init__(self, scenario: ResidencyScenario, found: Drawn, seed: int) -> None:
        pass

    def look(self, seen: Seen) -> Targets:
        return Targets()


class LeastRecent(CloudOnly):
    """A cache at each server: what its callers miss is fetched, what was used longest ago leaves."""

    uses_servers, loads, admits = True, True, True


class LeastFrequent(LeastRecent):
    """The same, where what was used least leaves."""

    rule: Rule = staticmethod(least_frequent)


class Popular(Planned):
    """Each server has what its callers ask for most."""

    rule: Rule = staticmethod(least_frequent)

    def look(self, seen: Seen) -> Targets:
        self._popularity = self._popularity.after(seen.arrived, seen.seconds)
        if not seen.of_disks:
            return Targets()
        return filled(self._found, [np.argsort(-rates, kind="stable") for rates in self.expected(seen)])


class Random(Planned):
    """Each server has what it was dealt; what is asked for is loaded."""

    loads = True
    rule: Rule = staticmethod(least_recent)

    def look(self, seen: Seen) -> Targets:
        rng = np.random.default_rng(self._seed)
        return filled(self._found, [rng.permutation(len(self._found.models)) for _ in self._found.servers])


def targets(found: Drawn, lying: Lying) -> Targets:
    """Of a way for blocks to lie, by server, smaller models first: those are there sooner."""
    return Targets(_models(found, lying.stored), _models(found, lying.resident))


def filled(found: Drawn, orders: list["np.ndarray"]) -> Targets:
    """As many as fit of each server's order, on its disk and in its memory."""
    wanted: dict[str, dict[int, tuple[int, ...]]] = {"disk": {}, "memory": {}}
    for number, (server, order) in enumerate(zip(found.servers, orders, strict=True)):
        for what, room in (("disk", server.box.disk_bytes), ("memory", server.box.memory_bytes)):
            held: set[str] = set()
            models: list[int] = []
            for model in order:
                pieces = held | set(found.models[model].pieces)
                if sum(getattr(found.pieces[piece], f"{what}_bytes") for piece in pieces) <= room:
                    held, models = pieces, [*models, int(model)]
            wanted[what][number] = tuple(models)
    return Targets(wanted["disk"], wanted["memory"])


def _models(found: Drawn, items: frozenset[tuple[str, str]]) -> dict[int, tuple[int, ...]]:
    """By server the models all of whose pieces are there."""
    by_box: dict[str, set[str]] = {}
    for node, piece in items:
        by_box.setdefault(node, set()).add(piece)
    sizes = [sum(found.pieces[piece].disk_bytes for piece in model.pieces) for model in found.models]
    order = sorted(range(len(found.models)), key=lambda number: sizes[number])
    return {
        number: tuple(m for m in order if by_box.get(server.box.name, set()).issuperset(found.models[m].pieces))
        for number, server in enumerate(found.servers)
    }


def _stored(found: Drawn, lying: Lying) -> dict[int, tuple[int, ...]]:
    return _models(found, lying.stored)


@dataclass(frozen=True)
class Known:
    """A contender by name."""

    made: Callable[[ResidencyScenario, Drawn, int], Keeper]
    title: str


KNOWN: Mapping[str, Known] = {
    "full": Known(
        Planned, "Ours: marginal gain and swaps for expected rates, changes paid back; GreedyDual-Size between."
    ),
    "retro": Known(Retro, "RetroRenting on disks, GreedyDual-Size in memory: nothing is expected."),
    "program": Known(Program, "As ours, by an integer program solved for some seconds."),
    "genetic": Known(Genetic, "As ours, bred: the way of arXiv 2409.05303."),
    "switching-blind": Known(SwitchingBlind, "As ours, as if changes cost nothing."),
    "storage-only": Known(StorageOnly, "As ours for disks alone, as if whatever lies there were in memory."),
    "popularity": Known(Popular, "Each server has what its callers ask for most; the least frequent leave."),
    "lru": Known(LeastRecent, "A cache at each server; the least recent leave."),
    "lfu": Known(LeastFrequent, "A cache at each server; the least frequent leave."),
    "random": Known(Random, "Each server has what it was dealt."),
    "cloud-only": Known(CloudOnly, "Everything in the cloud."),
    "clairvoyant": Known(Clairvoyant, "As ours, told how often each model will be asked for."),
}

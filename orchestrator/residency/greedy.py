"""PURE: where blocks lie, by marginal gain, and by swaps (`mathematics.md`, C2).

The hosting is added, in memory or on disks alone, that saves most for what it takes of the scarcest room; what is there
already takes nothing again, so that models that share blocks come cheaper. Then, as long as that helps, one for which
there was no room is put in the place of those that are worth least for theirs, or one is given up, and what room is
left is filled anew.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import islice
from math import inf

import numpy as np

from orchestrator.residency.problem import Bools, Chosen, Floats, Ints, Lying, Setting

TRIED = 60
"""Swaps that are tried, at most: the likeliest first."""
LEAST = 1e-9
"""What something must save a second, of a request's waiting, to be done."""

Part = tuple[int, bool]
"""A hosting by number, and whether it is in memory or on disks alone."""


def place(setting: Setting, tried: int = TRIED) -> Lying:
    """What is to lie where."""
    best = min((_State(setting, start) for start in _starts(setting)), key=lambda one: one.cost)
    while tried > 0:
        better = None
        for trial in islice(best.swapped(), tried):
            tried -= 1
            if trial.cost < best.cost - LEAST:
                better = trial
                break
        if better is None:
            break
        best = better
    return setting.of(Chosen(best.resident, best.stored))


def _starts(setting: Setting) -> Iterator[Chosen]:
    """Nothing, and what there is."""
    nothing = np.zeros(len(setting.table.hostings), bool)
    yield Chosen(nothing, nothing)
    if setting.before.stored:
        able = setting.table.able(setting.before)
        yield Chosen(able.resident, able.stored & ~able.resident)


@dataclass
class _Gains:
    """What each hosting of all models would save, served from memory and from disks."""

    memory: Floats
    disk: Floats


class _State:
    """Hostings that are chosen, and who is served by which."""

    def __init__(self, setting: Setting, start: Chosen) -> None:
        """That, and what saves more beside it."""
        self._setting, self._table = setting, setting.table
        hostings = len(self._table.hostings)
        self.resident, self.stored = start.resident.copy(), start.stored.copy()
        self._lay()
        self._gains = _Gains(np.zeros(hostings), np.zeros(hostings))
        self._strain = [np.zeros(len(self._table.strength)) for _ in setting.wanted]
        """What each model takes of each node's work and energy."""
        self._served = [one.absent.copy() for one in setting.wanted]
        """What a request of each caller costs now."""
        for number in range(len(setting.wanted)):
            self._serve(number)
        self._trim()
        self.fill()

    def copy(self) -> "_State":
        other = object.__new__(_State)
        other._setting, other._table = self._setting, self._table
        for name in ("resident", "stored", "_in_memory", "_on_disk"):
            setattr(other, name, getattr(self, name).copy())
        other._gains = _Gains(self._gains.memory.copy(), self._gains.disk.copy())
        other._strain = [each.copy() for each in self._strain]
        other._served = [each.copy() for each in self._served]
        return other

    @property
    def cost(self) -> float:
        kept = float(self._table.keep_disk @ self._on_disk + self._table.keep_memory @ self._in_memory)
        served = zip(self._setting.wanted, self._served, strict=True)
        return kept + sum(float(one.rates @ costs) for one, costs in served)

    def fill(self, barred: Part | None = None) -> None:
        """Add what saves most for its room, until nothing fits or helps."""
        useless = set() if barred is None else {barred}
        while (found := self._best(useless)) is not None:
            before = self.cost
            self._change(found, True)
            if self.cost >= before - LEAST:
                # It was to serve with work that others of its nodes' models do by now.
                self._change(found, False)
                useless.add(found)

    def _trim(self) -> None:
        """Give up what costs more than it saves."""
        for part in self._chosen():
            before = self.cost
            self._change(part, False)
            if self.cost > before:
                self._change(part, True)

    def swapped(self) -> Iterator["_State"]:
        """What one swap makes of it, the likeliest first."""
        for part in self._wanted():
            trial = self.copy()
            if trial._force(part):
                trial.fill()
                yield trial
        for part in self._chosen():
            trial = self.copy()
            trial._change(part, False)
            trial.fill(part)
            yield trial

    def _wanted(self) -> list[Part]:
        """What is not chosen and would help, by how much."""
        found = []
        for in_memory, gains, chosen in (
            (True, self._gains.memory, self.resident),
            (False, self._gains.disk, self.stored | self.resident),
        ):
            saves = gains - self._takes(in_memory)[2]
            found += [(float(saves[n]), (int(n), in_memory)) for n in np.flatnonzero((saves > LEAST) & ~chosen)]
        return [part for _, part in sorted(found, reverse=True)]

    def _chosen(self) -> list[Part]:
        found = [(int(number), True) for number in np.flatnonzero(self.resident)]
        return found + [(int(number), False) for number in np.flatnonzero(self.stored & ~self.resident)]

    def _force(self, part: Part) -> bool:
        """Choose it in the place of what is worth least for its room where it needs some; whether it fits at all."""
        number, in_memory = part
        boxes = set(self._table.pair_box[self._table.pair_hosting == number])
        near = np.zeros(len(self._table.hostings), bool)
        near[self._table.pair_hosting[np.isin(self._table.pair_box, list(boxes))]] = True
        while not self._takes(in_memory)[0][number]:
            others = [one for one in self._chosen() if near[one[0]] and one[0] != number]
            if not others:
                return False
            self._change(min(others, key=lambda one: (self._worth(one), one)), False)
        self._change(part, True)
        return True

    def _worth(self, part: Part) -> float:
        """What is lost without it, for each byte of room that it leaves."""
        before, taken = self.cost, self._bytes
        self._change(part, False)
        lost, freed = self.cost - before, taken - self._bytes
        self._change(part, True)
        return lost / max(freed, 1.0)

    @property
    def _bytes(self) -> float:
        return float(self._table.disk @ self._on_disk + self._table.memory @ self._in_memory)

    def _change(self, part: Part, value: bool) -> None:
        number, in_memory = part
        (self.resident if in_memory else self.stored)[number] = value
        self._lay()
        self._serve(int(np.searchsorted(self._table.firsts, number, side="right")) - 1)

    def _best(self, useless: Set[Part]) -> Part | None:
        """What saves most for what it takes of the scarcest room that is left."""
        best, most = None, 0.0
        for in_memory, gains, chosen in (
            (True, self._gains.memory, self.resident),
            (False, self._gains.disk, self.stored | self.resident),
        ):
            fits, takes, keeps = self._takes(in_memory)
            saves = gains - keeps
            fits[[number for number, memory in useless if memory == in_memory]] = False
            worth = np.where(fits & ~chosen & (saves > LEAST), saves / (takes + 1e-6), 0.0)
            number = int(worth.argmax()) if len(worth) else 0
            if len(worth) and worth[number] > most:
                best, most = (number, in_memory), float(worth[number])
        return best

    def _takes(self, in_memory: bool) -> tuple[Bools, Floats, Floats]:
        """Of each hosting whether what it lacks fits, the share it takes of what is left where least is, and what
        keeping it costs."""
        table = self._table
        disk = table.needs @ (table.disk * ~self._on_disk)
        left = table.disk_room - table.used(self._on_disk, table.disk)
        fits, share = disk <= left[table.pair_box], disk / np.maximum(left[table.pair_box], 1.0)
        keeps = table.needs @ (table.keep_disk * ~self._on_disk)
        if in_memory:
            memory = table.needs @ (table.memory * ~self._in_memory)
            left = table.memory_room - table.used(self._in_memory, table.memory)
            fits &= memory <= left[table.pair_box]
            share = np.maximum(share, memory / np.maximum(left[table.pair_box], 1.0))
            keeps = keeps + table.needs @ (table.keep_memory * ~self._in_memory)
        takes = np.zeros(len(table.hostings))
        np.maximum.at(takes, table.pair_hosting, share)
        return table.every(fits), takes, table.by_hosting(keeps)

    def _lay(self) -> None:
        self._in_memory = self._table.needed(self.resident)
        self._on_disk = self._table.needed(self.stored) | self._in_memory

    def _serve(self, model: int) -> None:
        """Send a model's requests where they cost least, as far as its nodes have strength, what saves most first."""
        one, table = self._setting.wanted[model], self._table
        self._strain[model] = np.zeros(len(table.strength))
        costs, chosen = self._costs(model)
        self._served[model] = one.absent.copy()
        if len(chosen):
            free = table.strength - sum(self._strain)
            saves = (one.rates[:, None] * (one.absent[:, None] - costs)).max(axis=1)
            for caller in np.argsort(-saves, kind="stable"):
                if saves[caller] > 0.0:
                    self._goes(model, int(caller), costs[caller], chosen, free)
        self._weigh(model, table.strength - sum(self._strain))

    def _goes(self, model: int, caller: int, costs: Floats, chosen: Ints, free: Floats) -> None:
        """Share out a caller's requests, the cheapest hostings first; what they take is gone from `free`."""
        one, left, total = self._setting.wanted[model], 1.0, 0.0
        absent, rate = float(one.absent[caller]), float(one.rates[caller])
        for number in np.argsort(costs, kind="stable"):
            if left <= 0.0 or costs[number] >= absent:
                break
            asks = rate * self._table.asks[chosen[number]]
            share = min(left, _fits(asks, free))
            free -= share * asks
            self._strain[model] += share * asks
            total, left = total + share * float(costs[number]), left - share
        self._served[model][caller] = total + left * absent

    def _costs(self, model: int) -> tuple[Floats, Ints]:
        """[callers, chosen hostings of the model], and their numbers."""
        first, end = self._table.firsts[model : model + 2]
        resident, stored = self._table.costs[model]
        mine = np.flatnonzero((self.resident | self.stored)[first:end])
        costs = np.where(self.resident[first:end][mine][None, :], resident[:, mine], stored[:, mine])
        return costs, mine + first

    def _weigh(self, model: int, free: Floats) -> None:
        """What each hosting of a model would save beside what serves now, as far as its nodes have strength left."""
        one = self._setting.wanted[model]
        first, end = self._table.firsts[model : model + 2]
        now, asks = self._served[model][:, None], self._table.asks[first:end]
        for costs, gains in zip(self._table.costs[model], (self._gains.memory, self._gains.disk), strict=True):
            is_better = costs < now
            saves = np.where(is_better, now - np.where(is_better, costs, 0.0), 0.0)
            moved = (one.rates[:, None] * is_better).sum(axis=0)
            shares = np.array([min(1.0, _fits(rate * each, free)) for rate, each in zip(moved, asks, strict=True)])
            gains[first:end] = shares * (one.rates[:, None] * saves).sum(axis=0)


def _fits(asks: Floats, free: Floats) -> float:
    """How many times what is asked there is strength for, 0 at least."""
    busy = asks > 0.0
    return max(0.0, float((free[busy] / asks[busy]).min())) if busy.any() else inf

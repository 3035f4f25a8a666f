"""PURE: where blocks lie, by an integer program, and a bound of what that costs at least (`mathematics.md`, C2).

    min  sum_i keep_disk_i s_i + keep_memory_i h_i + sum_r lambda_r (absent_r + sum_o (c_ro - absent_r) z_ro)
    z_ro from memory <= H_o <= h_i, z_ro from disks <= S_o <= s_i for every item i that hosting o needs,   h_i <= s_i
    sum_o z_ro <= 1,   disk, memory, work and energy of each node

Without its integers it is a bound. That is what the best multipliers of the Lagrangian give, too, which relaxes the
rooms, the callers and what hostings need: what is left over has whole solutions anyway.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array

from orchestrator.residency.problem import Floats, Ints, Lying, Setting
from schemas.errors import ErrorCode, ResplitError


@dataclass(frozen=True)
class Solved:
    """What the program found."""

    lying: Lying
    cost: float
    bound: float
    """No way costs less."""

    @property
    def gap(self) -> float:
        return self.cost / self.bound - 1.0 if self.bound > 0.0 else inf


def place(setting: Setting, time_limit_s: float = 60.0) -> Solved:
    """The best there is, or the best that was found in that time. Raises `ResplitError(INFEASIBLE)` if there was none,
    which more time mends: nothing anywhere is always a solution."""
    model = _Model(setting)
    found = milp(
        model.costs,
        integrality=model.whole,
        bounds=Bounds(0.0, 1.0),
        constraints=LinearConstraint(model.matrix, -inf, model.most),
        options={"time_limit": time_limit_s},
    )
    if found.x is None:
        message = f"no way for blocks to lie was found in {time_limit_s:g} s: {found.message}"
        raise ResplitError(ErrorCode.INFEASIBLE, message)
    table, chosen = setting.table, found.x > 0.5
    stored, resident = chosen[model.disk], chosen[model.memory]
    lying = Lying(table.named(stored | resident), table.named(resident))
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else -inf
    return Solved(lying, float(found.fun) + model.constant, float(bound) + model.constant)


def bound(setting: Setting) -> float:
    """No way for blocks to lie costs less a second."""
    model = _Model(setting)
    found = linprog(model.costs, A_ub=model.matrix, b_ub=model.most, bounds=(0.0, 1.0))
    assert found.success, f"nothing anywhere is a solution: {found.message}"
    return float(found.fun) + model.constant


class _Model:
    """The program as arrays: all columns between 0 and 1, all rows at most something."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._table = setting, setting.table
        self._entries: list[tuple[Ints, Ints, Floats]] = []
        self._most: list[float] = []
        self._rows = 0
        items, hostings = len(self._table.items), len(self._table.hostings)
        self.disk, self.memory = np.arange(items), items + np.arange(items)
        self._from_disk, self._from_memory = (2 * items + part * hostings + np.arange(hostings) for part in (0, 1))
        self._columns = 2 * items + 2 * hostings
        self._costs: list[Floats] = [self._table.keep_disk, self._table.keep_memory, np.zeros(2 * hostings)]
        self.constant = sum(float(one.rates @ one.absent) for one in setting.wanted)
        self._strain: list[tuple[Ints, Ints, Floats]] = []
        self._rooms()
        for number in range(len(setting.wanted)):
            self._requests(number)
        self._strength()
        self.costs = np.concatenate(self._costs)
        self.whole = np.zeros(self._columns)
        self.whole[: 2 * items] = 1
        rows, columns, values = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        self.matrix = coo_array((values, (rows, columns)), shape=(self._rows, self._columns)).tocsr()
        self.most = np.array(self._most)

    def _add(self, rows: Ints, columns: Ints, values: Floats, most: Floats) -> None:
        """Some rows, numbered from 0."""
        self._entries.append((rows + self._rows, columns, values))
        self._most += list(most)
        self._rows += len(most)

    def _below(self, these: Ints, those: Ints) -> None:
        """Each of these columns is at most that one."""
        count = len(these)
        rows = np.concatenate([np.arange(count)] * 2)
        values = np.concatenate([np.ones(count), -np.ones(count)])
        self._add(rows, np.concatenate([these, those]), values, np.zeros(count))

    def _rooms(self) -> None:
        # As shares of a room: beside coefficients of 1, bytes have HiGHS call proven what is not.
        table = self._table
        for columns, sizes, rooms in (
            (self.disk, table.disk, table.disk_room),
            (self.memory, table.memory, table.memory_room),
        ):
            self._add(table.at, columns, sizes / np.maximum(1.0, rooms)[table.at], np.minimum(1.0, rooms))
        self._below(self.memory, self.disk)
        needs = table.needs.tocoo()
        hostings = table.pair_hosting[needs.coords[0]]
        self._below(self._from_disk[hostings], self.disk[needs.coords[1]])
        self._below(self._from_memory[hostings], self.memory[needs.coords[1]])

    def _requests(self, number: int) -> None:
        """The requests of a model: columns for those that are worth serving."""
        one, first = self._setting.wanted[number], self._table.firsts[number]
        rows, gates, gains = [], [], []
        for costs, gate in zip(self._table.costs[number], (self._from_memory, self._from_disk), strict=True):
            caller, hosting = np.nonzero((costs < one.absent[:, None]) & (one.rates[:, None] > 0.0))
            rows.append(caller)
            gates.append(gate[first + hosting])
            gains.append(one.rates[caller] * (costs[caller, hosting] - one.absent[caller]))
        callers, gate = np.concatenate(rows), np.concatenate(gates)
        columns = self._columns + np.arange(len(callers))
        self._columns += len(callers)
        self._costs.append(np.concatenate(gains))
        self._add(callers, columns, np.ones(len(callers)), np.ones(len(one.rates)))
        self._below(columns, gate)
        hostings = (gate - self._from_disk[0]) % len(self._table.hostings)
        self._strain.append((columns, hostings, one.rates[callers]))

    def _strength(self) -> None:
        """What nodes can do, and the energy that they may take."""
        bounded = np.flatnonzero(np.isfinite(self._table.strength))
        if not len(bounded) or not self._strain:
            return
        columns, hostings, rates = (np.concatenate(part) for part in zip(*self._strain, strict=True))
        most = np.maximum(1e-12, self._table.strength[bounded])
        taken = self._table.asks[hostings][:, bounded] * rates[:, None] / most
        which, room = np.nonzero(taken)
        self._add(room, columns[which], taken[which, room], np.minimum(1.0, self._table.strength[bounded] / 1e-12))

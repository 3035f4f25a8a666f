"""PURE: where blocks lie, bred: the algorithm of arXiv 2409.05303, for comparison (`mathematics.md`, C2).

A way for blocks to lie is a bit for each hosting, in memory and on disks alone. Of two that are drawn the cheaper one
becomes a parent; a child has each bit of either parent, now and then another one; what does not fit loses bits until
it does. The best lives on.
"""

import numpy as np

from orchestrator.residency.problem import Bools, Chosen, Lying, Setting

POPULATION = 24
GENERATIONS = 40
FLIPPED = 2.0
"""Bits of a child that change by chance, on average."""
FIRST = 0.1
"""The share of bits that are set in the beginning."""


def place(setting: Setting, seed: int, population: int = POPULATION, generations: int = GENERATIONS) -> Lying:
    """The best that was bred. Deterministic for a seed."""
    rng = np.random.default_rng(seed)
    bits = (2, len(setting.table.hostings))
    nothing, today = np.zeros(bits, bool), _today(setting)
    alive = [nothing, _fitting(setting, today, rng)]
    alive += [_fitting(setting, rng.random(bits) < FIRST, rng) for _ in range(population - len(alive))]
    costs = [_cost(setting, one) for one in alive]
    for _ in range(generations):
        best = int(np.argmin(costs))
        children = [alive[best]]
        while len(children) < population:
            one, other = (_parent(alive, costs, rng) for _ in range(2))
            child = np.where(rng.random(bits) < 0.5, one, other) ^ (rng.random(bits) < FLIPPED / nothing.size)
            children.append(_fitting(setting, child, rng))
        alive, costs = children, [_cost(setting, one) for one in children]
    resident, stored = alive[int(np.argmin(costs))]
    return setting.of(Chosen(resident, stored))


def _today(setting: Setting) -> Bools:
    able = setting.table.able(setting.before)
    return np.array([able.resident, able.stored & ~able.resident])


def _parent(alive: list[Bools], costs: list[float], rng: np.random.Generator) -> Bools:
    one, other = (int(number) for number in rng.integers(len(alive), size=2))
    return alive[one if costs[one] <= costs[other] else other]


def _fitting(setting: Setting, wanted: Bools, rng: np.random.Generator) -> Bools:
    """The same without some bits of the nodes on which too much would lie."""
    table, kept = setting.table, wanted.copy()
    while True:
        memory = table.needed(kept[0])
        disk = table.needed(kept[1]) | memory
        over = table.used(disk, table.disk) > table.disk_room
        over_memory = table.used(memory, table.memory) > table.memory_room
        if not (over.any() or over_memory.any()):
            return kept
        touches = np.array(
            [~table.every(~over_memory[table.pair_box] & ~over[table.pair_box]), ~table.every(~over[table.pair_box])]
        )
        which = np.flatnonzero((kept & touches).ravel())
        gone = rng.choice(which, max(1, len(which) // 8), replace=False)
        kept.ravel()[gone] = False


def _cost(setting: Setting, chosen: Bools) -> float:
    """What it costs if each request goes where it costs least, however much goes there."""
    table = setting.table
    memory = table.needed(chosen[0])
    disk = table.needed(chosen[1]) | memory
    cost = float(table.keep_disk @ disk + table.keep_memory @ memory)
    for one, first, (resident, stored) in zip(setting.wanted, table.firsts, table.costs, strict=False):
        mine = slice(first, first + len(one.hostings))
        costs = np.where(chosen[0][mine], resident, np.where(chosen[1][mine], stored, np.inf))
        cheapest = costs.min(axis=1, initial=np.inf)
        cost += float(one.rates @ np.minimum(cheapest, one.absent))
    return cost

"""The paper's proposal (arXiv 2601.19563) as far as its text goes (`mathematics.md`, B1), and PropAvg, its baseline
with mean delays in the place of effective capacity.

What the text leaves open is chosen here and named: the weights, and that a step which nothing serves yet is taken to
last as long as its deadline.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import inf, log

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, brentq, milp

from orchestrator.services.ahead import arrivals_ms
from orchestrator.services.core import Placed, load_of
from orchestrator.services.problem import SOURCE, Floats, ServiceKind, Setting, TaskKind
from profiler.effective_capacity import GammaService, Steady
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from simulator.tiers.contenders import way_ms
from simulator.tiers.drawn import Drawn
from simulator.tiers.scenario import TwoTierScenario
from simulator.tiers.world import Going, Seen, TierWorld

DELTA = 0.1
"""Of the softmax over nodes, one over ms."""
FLOOR = 0.1
"""Of what is left of a deadline, in times of what is still to be done."""
WORTH = 0.5
"""xi, in times of what makes the best place of a service cost nothing."""
COPIES = 2
"""kappa, over all core services together, for each of them."""
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
"""Of sum z~, that is asked for."""
ETA = 0.05
"""Of the cost of a slot, against a millisecond of one request."""
ZETA = 1.0
"""Below which no request's queue falls."""
INSTANCES_MAX = 64
"""Of a service on a node."""


def backbone(setting: Setting) -> Placed:
    """The paper's core placement; where as many instances as it asks for do not fit, of as much less as has to be.
    Raises `ResplitError(INFEASIBLE)` where not even a tenth fits."""
    for share in SHARES:
        if (found := _placed(setting, share)) is not None:
            return found
    raise ResplitError(ErrorCode.INFEASIBLE, "a tenth of the load is more than the nodes hold; add servers", "loads")


def _placed(setting: Setting, share: float) -> Placed | None:
    """min sum x (c - xi Q), C1 to C4."""
    names = [name for name, kind in setting.services.items() if kind.is_core]
    nodes, load = setting.nodes, load_of(setting)
    wants, quality = _wanted(setting, names)
    size = len(names) * len(nodes)
    cost = np.zeros(2 * size)
    most = np.ones(2 * size)
    rows: list[tuple[Floats, float, float]] = []
    for m, name in enumerate(names):
        kind = setting.services[name]
        worth = WORTH * kind.keep_cost * quality[m] / max(float(quality[m].max()), 1e-12)
        cost[m * len(nodes) : (m + 1) * len(nodes)] = kind.keep_cost - worth
        row = np.zeros(2 * size)
        row[m * len(nodes) : (m + 1) * len(nodes)] = 1.0
        rows.append((row, max(1.0, share * float(wants[m].sum())), inf))  # C2
        for v in range(len(nodes)):
            at = m * len(nodes) + v
            most[at] = max(1.0, np.ceil(load[name]))
            low, high = np.zeros(2 * size), np.zeros(2 * size)
            low[at], low[size + at] = 1.0, -1.0
            high[at], high[size + at] = 1.0, -most[at]
            rows += [(low, 0.0, inf), (high, -inf, 0.0)]
    for v, node in enumerate(nodes):
        for key, has in setting.hosts[node].has.items():
            row = np.zeros(2 * size)
            for m, name in enumerate(names):
                row[m * len(nodes) + v] = setting.services[name].needs.get(key, 0.0)
            rows.append((row, -inf, has))  # C1
    row = np.zeros(2 * size)
    row[size:] = 1.0
    rows.append((row, float(COPIES * len(names)), inf))  # C4
    constraint = LinearConstraint(
        np.array([row for row, _, _ in rows]), [low for _, low, _ in rows], [high for _, _, high in rows]
    )
    found = milp(
        cost,
        integrality=np.ones(2 * size),
        bounds=Bounds(np.zeros(2 * size), most),
        constraints=constraint,
        options={"time_limit": 10.0},
    )
    if found.x is None:
        return None
    return {
        (node, name): round(found.x[m * len(nodes) + v])
        for m, name in enumerate(names)
        for v, node in enumerate(nodes)
        if round(found.x[m * len(nodes) + v])
    }


def _wanted(setting: Setting, names: list[str]) -> tuple[Floats, Floats]:
    """By core service and node: z~, what comes there if nodes are as likely as they are near, and Q."""
    wants = np.zeros((len(names), len(setting.nodes)))
    left = np.zeros_like(wants)
    for stream in setting.streams:
        task, at_ms = setting.tasks[stream.task], arrivals_ms(setting, stream)
        for m, name in enumerate(names):
            if name not in task.after:
                continue
            age_ms = sum(stream.ages_ms) / len(stream.ages_ms)
            there_ms = np.array([at_ms[name, node] for node in setting.nodes]) + age_ms
            near = np.exp(-DELTA * (there_ms - there_ms.min()))
            kind = setting.services[name]
            after_ms = sum(setting.services[each].mean_ms for each in behind(task, name)) or kind.mean_ms
            wants[m] += stream.per_slot * near / near.sum()
            left[m] += stream.per_slot * np.maximum((task.deadline_ms - there_ms - kind.mean_ms) / after_ms, FLOOR)
    return wants, wants * left


def behind(task: TaskKind, name: str) -> set[str]:
    """Everything that waits for it, sooner or later."""
    found = {name}
    for each in task.order:
        if found.intersection(task.after[each]):
            found.add(each)
    return found - {name}


class Paper:
    """The paper's controller: in every slot, the best single instance is added until none is worth it."""

    uses_capacity = True
    """Whether a delay is taken from effective capacity, or from means."""

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        self._setting, self._speeds, self._eps = found.setting, found.speeds, scenario.paper_eps
        self.every_slots = scenario.steer_slots
        self.core = backbone(found.setting)
        self._owed: dict[int, float] = {}
        """H, by request."""
        self._room = _room(found.setting, self.core)

    def slot(self, seen: Seen) -> Placed:
        now_ms = seen.slot * self._speeds.slot_ms
        ways: dict[str, list[tuple[float, Floats, float]]] = {}
        self._owed = {one.request.number: self._queue(one, now_ms) for one in seen.under_way}
        for going in seen.under_way:
            owed = self._owed[going.request.number]
            for name, at, data in steps(self._setting, going):
                each_ms = self._setting.table.all_ms(data, self._setting.numbers[at])
                ways.setdefault(name, []).append((owed, each_ms, going.task.deadline_ms))
        return self._greedy(ways, seen.light)

    def host(self, world: TierWorld, going: Going, service: str, inputs: Mapping[str, NodeId]) -> NodeId | None:
        hosts = world.hosts.get(service, ())
        if not hosts:
            return None
        kind = self._setting.services[service]

        def done_ms(node: NodeId) -> float:
            busy = world.pools[node, service].busy + 1.0
            return way_ms(world, going, inputs, node) + (
                busy * kind.mean_ms if kind.is_core else self._delay_ms(kind, busy)
            )

        return min(hosts, key=lambda node: (done_ms(node), node))

    def _queue(self, going: Going, now_ms: float) -> float:
        """H_j <- max(H_j + age_j - D_j, zeta)."""
        late_ms = now_ms - going.request.sent_ms - going.task.deadline_ms
        return max(self._owed.get(going.request.number, ZETA) + late_ms, ZETA)

    def _delay_ms(self, kind: ServiceKind, each: float) -> float:
        """g, with so many requests at one instance."""
        speed = self._speeds.one[kind.name]
        return delay_ms(speed, kind.work, self._speeds.slot_ms, max(1, round(each)), self._eps, self.uses_capacity)

    def _greedy(self, ways: Mapping[str, list[tuple[float, Floats, float]]], before: Placed) -> Placed:
        placed: dict[tuple[NodeId, str], int] = {}
        free = {key: room.copy() for key, room in self._room.items()}
        gains = {name: self._best(name, jobs, placed, before, free) for name, jobs in ways.items()}
        while gains:
            name = max(gains, key=lambda each: (gains[each][0], each))
            gain, at = gains[name]
            if gain <= 0.0:
                break
            node = self._setting.nodes[at]
            placed[node, name] = placed.get((node, name), 0) + 1
            for key, need in self._setting.services[name].needs.items():
                free[key][at] -= need
            # Others may have lost their room only where this one took it.
            for other in gains:
                if other == name or gains[other][1] == at:
                    gains[other] = self._best(other, ways[other], placed, before, free)
        return placed

    def _best(
        self,
        name: str,
        jobs: list[tuple[float, Floats, float]],
        placed: Placed,
        before: Placed,
        free: Mapping[str, Floats],
    ) -> tuple[float, int]:
        """The instance that is worth most, and what it is worth."""
        kind = self._setting.services[name]
        counts = np.array([placed.get((node, name), 0) for node in self._setting.nodes], float)
        able = np.ones(len(counts), dtype=bool)
        for key, need in kind.needs.items():
            able &= free[key] >= need
        able &= counts < INSTANCES_MAX
        now = self._spent(kind, jobs, counts)
        best = (0.0, -1)
        for at in np.flatnonzero(able):
            counts[at] += 1
            had = before.get((self._setting.nodes[at], name), 0)
            cost = kind.keep_cost + (kind.deploy_cost if counts[at] > had else 0.0)
            gain = now - self._spent(kind, jobs, counts) - ETA * cost
            counts[at] -= 1
            if gain > best[0]:
                best = (gain, int(at))
        return best

    def _spent(self, kind: ServiceKind, jobs: list[tuple[float, Floats, float]], counts: Floats) -> float:
        """Sum of H_j delay_j, each request at the instance that is best for it, one after another."""
        hosts = np.flatnonzero(counts)
        if not len(hosts):
            return sum(owed * deadline for owed, _, deadline in jobs)
        has: list[float] = counts[hosts].tolist()
        taken, total = [1.0] * len(has), 0.0
        each = np.array([self._delay_ms(kind, 1.0 / count) for count in has])
        for owed, each_way_ms, deadline in jobs:
            delays = each_way_ms[hosts] + each
            best = int(delays.argmin())
            total += owed * min(float(delays[best]), deadline)
            taken[best] += 1.0
            each[best] = self._delay_ms(kind, taken[best] / has[best])
        return total


class PropAvg(Paper):
    """The same with mean delays."""

    uses_capacity = False


def steps(setting: Setting, going: Going) -> list[tuple[str, NodeId, float]]:
    """The light steps of a request that come next: with where what they read is made, and how much that is."""
    found = []
    for name, befores in going.task.after.items():
        if name in going.done or name in going.hosts or setting.services[name].is_core:
            continue
        for before in befores:
            at = going.request.at if before == SOURCE else going.hosts.get(before)
            if at is not None:
                found.append((name, at, setting.passed_on(going.task, before)))
                break
    return found


def _room(setting: Setting, core: Placed) -> dict[str, Floats]:
    """By resource: what core services leave of each node."""
    left = setting.room(core).values()
    return {key: np.array([each.get(key, 0.0) for each in left]) for key in setting.resources}


@lru_cache(maxsize=1 << 16)
def delay_ms(
    speed: Steady | GammaService, work: float, slot_ms: float, jobs: int, eps: float, uses_capacity: bool
) -> float:
    """g = max(slot, y a / f, d), with d = ln(r / (f eps)) / (theta r) where EC(theta) = r = y a / W."""
    mean_ms = jobs * work / speed.mean * slot_ms
    found = max(slot_ms, mean_ms)
    if not uses_capacity:
        return found
    rate = jobs * work
    if rate >= speed.mean:
        # No exponent: as if what is too much were done at the mean rate, slot after slot.
        return found + slot_ms * log(1.0 / eps) * rate / speed.mean
    assert isinstance(speed, GammaService)
    theta = brentq(lambda it: speed.capacity(it) - rate, 1e-9, 1e4)
    late = log(max(rate / (speed.mean * eps), 1.0 + 1e-12)) / (theta * rate)
    return float(max(found, late * slot_ms))

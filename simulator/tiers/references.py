"""What the controllers of two tiers are also held against: who knows the future, who solves each slot to proof, and who
breeds."""

from collections.abc import Mapping
from math import inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from orchestrator.services.core import FAR_MS, Placed, load_of
from orchestrator.services.problem import SOURCE, Floats, Setting
from orchestrator.services.routing import Speeds, counted, routed
from schemas.base import NodeId
from simulator.draws import Draws
from simulator.tiers.contenders import BUSY, Measuring, backbone, way_ms
from simulator.tiers.drawn import Drawn
from simulator.tiers.scenario import TwoTierScenario
from simulator.tiers.world import Going, Seen, TierWorld

MS_COST = 0.05
"""What a millisecond on the way of one request counts, in units of cost; as the paper's controller has it."""
POPULATION, GENERATIONS, MUTATES = 24, 8, 0.05
BREEDS_SLOTS = 100
"""How often: it takes longer than a slot."""
COUNT_MAX = 4
"""Instances of a service on a node, of those that are bred."""


class Clairvoyant:
    """Knows when everything that waits will be done, pays for nothing, and has every service on every node that has
    room. Not proven to be the best that there is; nobody else knows what it knows."""

    every_slots = 1_000_000_000

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        self._placed = filled(found.setting, backbone(found.setting, found.speeds))
        self.core = {place: count for place, count in self._placed.items() if found.setting.services[place[1]].is_core}

    def slot(self, seen: Seen) -> Placed:
        return {place: count for place, count in self._placed.items() if place not in self.core}

    def host(self, world: TierWorld, going: Going, service: str, inputs: Mapping[str, NodeId]) -> NodeId | None:
        left, number = world.ahead[going.request.task][service], world.setting.numbers

        def done_ms(node: NodeId) -> float:
            # What comes before it on the way is not known yet, even to it.
            there_ms = world.kernel.now + way_ms(world, going, inputs, node)
            return world.pools[node, service].done_ms(there_ms) + float(left[number[node]])

        return min(world.hosts.get(service, ()), key=lambda node: (done_ms(node), node), default=None)


def filled(setting: Setting, core: Placed) -> Placed:
    """Every service on every node, once and then once more, as long as there is room; `core` first."""
    placed = dict(core)
    free = setting.room(core)
    small_first = sorted(setting.services.values(), key=lambda kind: (kind.is_core, kind.name))
    for _ in range(COUNT_MAX):
        for kind in small_first:
            for node, room in free.items():
                if all(room.get(key, 0.0) >= need for key, need in kind.needs.items()):
                    for key, need in kind.needs.items():
                        room[key] -= need
                    placed[node, kind.name] = placed.get((node, kind.name), 0) + 1
    return placed


class SlotProgram(Measuring):
    """An integer program in each slot: the least cost of instances and ways that does what comes, by mean rates."""

    def slot(self, seen: Seen) -> Placed:
        setting = self.now(seen)
        found = light_program(setting, self._speeds, self.core, seen.light)
        return seen.light if found is None else found


def light_program(setting: Setting, speeds: Speeds, core: Placed, before: Placed) -> Placed | None:
    """min sum keep x + deploy (x - before)^+ + MS_COST sum flow way, so that instances do BUSY of what comes and fit.

    What a service reads comes from where the core service before it is nearest to who asks, or from the user."""
    names = [name for name, kind in setting.services.items() if not kind.is_core]
    nodes, size = setting.nodes, len(names) * len(setting.nodes)
    ways, load = _ways(setting, core, names), load_of(setting)
    had = counted(setting, before)
    cost, rows, columns, values = np.zeros(3 * size), list[int](), list[int](), list[float]()
    low, high = list[float](), list[float]()

    def add(terms: list[tuple[int, float]], least: float, most: float) -> None:
        for column, value in terms:
            rows.append(len(low))
            columns.append(column)
            values.append(value)
        low.append(least)
        high.append(most)

    for m, name in enumerate(names):
        kind = setting.services[name]
        each = [m * len(nodes) + v for v in range(len(nodes))]
        for v, at in enumerate(each):
            cost[at], cost[size + at] = kind.keep_cost, kind.deploy_cost
            cost[2 * size + at] = MS_COST * load[name] * ways[m, v]
            add([(size + at, 1.0), (at, -1.0)], -float(had[name][v]), inf)
            add([(2 * size + at, load[name] * speeds.share(kind) / BUSY), (at, -1.0)], -inf, 0.0)
        add([(2 * size + at, 1.0) for at in each], 1.0, 1.0)
        add([(at, 1.0) for at in each], 1.0, inf)
    for v, left in enumerate(setting.room(core).values()):
        for key in setting.resources:
            terms = [(m * len(nodes) + v, setting.services[n].needs.get(key, 0.0)) for m, n in enumerate(names)]
            add(terms, -inf, left.get(key, 0.0))
    matrix = coo_array((values, (rows, columns)), shape=(len(low), 3 * size)).tocsr()
    whole = np.concatenate([np.ones(size), np.zeros(2 * size)])
    answer = milp(
        cost,
        integrality=whole,
        bounds=Bounds(np.zeros(3 * size), np.full(3 * size, 1e4)),
        constraints=LinearConstraint(matrix, np.array(low), np.array(high)),
        options={"time_limit": 1.0, "mip_rel_gap": 0.01},
    )
    if answer.x is None:
        return None
    return {
        (node, name): round(answer.x[m * len(nodes) + v])
        for m, name in enumerate(names)
        for v, node in enumerate(nodes)
        if round(answer.x[m * len(nodes) + v])
    }


def _ways(setting: Setting, core: Placed, names: list[str]) -> Floats:
    """By light service and node: what its inputs take to it, and what it passes on to the nearest core service."""
    found, weights = np.zeros((len(names), len(setting.nodes))), np.zeros(len(names))
    hosts = {name: [setting.numbers[node] for node, each in core if each == name] for name in setting.services}
    for stream in setting.streams:
        task = setting.tasks[stream.task]
        for m, name in enumerate(names):
            if name not in task.after:
                continue
            weights[m] += stream.per_slot
            for before in task.after[name]:
                if before == SOURCE:
                    way = setting.table.all_ms(task.input, setting.numbers[stream.at])
                else:
                    data, at = setting.services[before].output, hosts[before] or [setting.numbers[stream.at]]
                    way = np.min([setting.table.all_ms(data, source) for source in at], axis=0)
                found[m] += stream.per_slot * np.minimum(way, FAR_MS)
            for behind, befores in task.after.items():
                if name in befores and hosts[behind]:
                    per_mb = setting.table.ms_per_mb[:, hosts[behind]].min(axis=1)
                    found[m] += stream.per_slot * np.minimum(setting.services[name].output * per_mb, FAR_MS)
    return found / np.maximum(weights, 1e-12)[:, None]


class Genetic(Measuring):
    """Breeds instances of light services now and then: for cost, and how long requests take in the mean."""

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        super().__init__(scenario, found)
        self.every_slots = BREEDS_SLOTS
        self._rng = Draws(0).stream("genetic")
        self._light = [name for name, kind in found.setting.services.items() if not kind.is_core]
        self._best: Floats | None = None

    def slot(self, seen: Seen) -> Placed:
        setting = self.now(seen)
        shape = (len(self._light), len(setting.nodes))
        people = [self._mended(setting, self._rng.integers(0, 2, shape).astype(float)) for _ in range(POPULATION)]
        if self._best is not None:
            people[0] = self._best
        had = counted(setting, seen.light)
        fit = [self._fitness(setting, one, had) for one in people]
        for _ in range(GENERATIONS):
            children = []
            for _ in range(POPULATION // 2):
                parents = [people[min(self._rng.integers(0, POPULATION, 3), key=lambda at: fit[at])] for _ in "ab"]
                child = np.where(self._rng.random(shape) < 0.5, *parents)
                child = np.where(self._rng.random(shape) < MUTATES, self._rng.integers(0, COUNT_MAX, shape), child)
                children.append(self._mended(setting, child))
            people += children
            fit += [self._fitness(setting, one, had) for one in children]
            best = np.argsort(fit, kind="stable")[:POPULATION]
            people, fit = [people[at] for at in best], [fit[at] for at in best]
        self._best = people[0]
        return self._placed(setting, people[0])

    def _placed(self, setting: Setting, one: Floats) -> Placed:
        return {
            (setting.nodes[v], name): int(one[m, v])
            for m, name in enumerate(self._light)
            for v in np.flatnonzero(one[m])
        }

    def _mended(self, setting: Setting, one: Floats) -> Floats:
        """Without what does not fit."""
        free = setting.room(self.core)
        one = one.copy()
        for v, node in enumerate(setting.nodes):
            for m in self._rng.permutation(len(self._light)):
                needs, room = setting.services[self._light[m]].needs, free[node]
                while one[m, v] and any(room.get(key, 0.0) < one[m, v] * need for key, need in needs.items()):
                    one[m, v] -= 1
                for key, need in needs.items():
                    room[key] -= one[m, v] * need
        return one

    def _fitness(self, setting: Setting, one: Floats, had: Mapping[str, Floats]) -> float:
        """Cost of a slot, and what the mean request takes by mean rates; less is better."""
        plan = routed(setting, {**self.core, **self._placed(setting, one)}, self._speeds)
        total = 0.0
        for m, name in enumerate(self._light):
            kind = setting.services[name]
            fresh = np.maximum(one[m] - had[name], 0.0).sum()
            total += kind.keep_cost * one[m].sum() + kind.deploy_cost * fresh / self.every_slots
        for stream, route in plan.routes.items():
            task = setting.tasks[stream.task]
            if len(route) < len(task.after):
                total += MS_COST * stream.per_slot * 10.0 * task.deadline_ms
                continue
            done: dict[str, float] = {SOURCE: 0.0}
            for name in task.order:
                kind, node = setting.services[name], route[name]
                at = setting.numbers[node]
                rho = plan.flows[name][at] * self._speeds.share(kind) / plan.counts[name][at]
                waits = kind.mean_ms / (1.0 - rho) if rho < 1.0 else task.deadline_ms
                done[name] = waits + max(
                    done[each]
                    + setting.ways.ms(
                        setting.passed_on(task, each),
                        stream.at if each == SOURCE else route[each],
                        node,
                    )
                    for each in task.after[name]
                )
            total += MS_COST * stream.per_slot * min(max(done[name] for name in task.last), 10.0 * task.deadline_ms)
        return total

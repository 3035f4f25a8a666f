"""Who decides in a world of two tiers: the controller of the product, and what it is held against."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil

from orchestrator.services.core import Placed, Rules, load_of, place_core
from orchestrator.services.light import Steering, owed, steer
from orchestrator.services.measured import expected
from orchestrator.services.problem import Setting
from orchestrator.services.routing import Speeds
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from simulator.tiers.drawn import CLOUD, Drawn
from simulator.tiers.scenario import TwoTierScenario
from simulator.tiers.world import Going, Seen, TierWorld

BUSY = 0.7
"""Of what an instance does on average: what is asked of it where nothing says how much waits then."""
BUSIEST = 0.9
"""Where that does not fit."""
LATENCY_COST = 0.1
"""Of a millisecond on the way to a core service, for each request."""
FIRST = 4000
"""Changes that are priced before a run begins."""


def at_load(found: Drawn, load: float) -> Drawn:
    """The same world with so many times as much that comes."""
    streams = tuple(replace(one, per_slot=load * one.per_slot) for one in found.setting.streams)
    return replace(found, setting=replace(found.setting, streams=streams))


def backbone(setting: Setting, speeds: Speeds) -> Placed:
    """The core services by the product's program: what is left after any node does the work. Where that does not fit
    the rules are given up one after another, and at last the load that is planned for."""
    names = [name for name, kind in setting.services.items() if kind.is_core]
    strict = Rules({}, dict.fromkeys(names, 2), latency_cost=LATENCY_COST)
    loose = replace(strict, survives_node=False, replicas={})
    tries = [(strict, BUSY), (loose, BUSY), (loose, BUSIEST), (replace(loose, reserve=0.05), BUSIEST)]
    for rules, busy in [*tries, *((tries[-1][0], over) for over in (1.2, 1.6, 2.5, 4.0))]:
        capacity = {name: busy * speeds.one[name].mean / setting.services[name].work for name in names}
        with suppress(ResplitError):
            return place_core(setting, replace(rules, capacity=capacity), 10.0).placed
    raise ResplitError(ErrorCode.INFEASIBLE, "a quarter of the load is more than the nodes hold; add servers", "loads")


def soonest(world: TierWorld, service: str, inputs: Mapping[str, NodeId], going: Going) -> NodeId | None:
    """Over which node a request is done first as far as one can see: the way there, what waits there now at the mean
    rate, and the way from there."""
    kind, left = world.setting.services[service], world.ahead[going.request.task][service]

    def done_ms(node: NodeId) -> float:
        waits_ms = (world.pools[node, service].busy + 1.0) * kind.mean_ms
        return way_ms(world, going, inputs, node) + waits_ms + float(left[world.setting.numbers[node]])

    return min(world.hosts.get(service, ()), key=lambda node: (done_ms(node), node), default=None)


def way_ms(world: TierWorld, going: Going, inputs: Mapping[str, NodeId], node: NodeId) -> float:
    """Until all that is there to be sent is at a node."""
    setting = world.setting
    return max(setting.ways.ms(setting.passed_on(going.task, before), at, node) for before, at in inputs.items())


class Measuring:
    """Has the product's core services, and knows what comes as far as it was measured; requests go where they are done
    first."""

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        self._setting, self._speeds, self.every_slots = found.setting, found.speeds, scenario.steer_slots
        self.core = backbone(found.setting, found.speeds)
        self._rates = expected(found.setting.streams)

    def now(self, seen: Seen) -> Setting:
        """With what comes, as measured until now."""
        if seen.slot:
            self._rates = self._rates.after(seen.arrived, self.every_slots)
        return replace(self._setting, streams=self._rates.of(self._setting.streams))

    def host(self, world: TierWorld, going: Going, service: str, inputs: Mapping[str, NodeId]) -> NodeId | None:
        return soonest(world, service, inputs, going)


class Corrected(Measuring):
    """The controller of the product, told nothing but what came and what was late."""

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        super().__init__(scenario, found)
        allowed = dict.fromkeys(found.setting.tasks, scenario.allowed_late)
        self._steering = Steering(allowed, scenario.cost_weight)
        self._debts: Mapping[str, float] = {}
        first = replace(self._steering, tried=FIRST)
        setting = replace(found.setting, streams=self._rates.of(found.setting.streams))
        steered = steer(setting, found.speeds, first, {}, self.core, {})
        self._known = steered.known
        self._first: Placed | None = self._light(steered.placed)

    def slot(self, seen: Seen) -> Placed:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        arrived: dict[str, int] = {}
        for (task, _), count in seen.arrived.items():
            arrived[task] = arrived.get(task, 0) + count
        self._debts = owed(self._debts, self._steering.allowed, arrived, seen.missed)
        turn = seen.slot // self.every_slots
        setting = self.now(seen)
        steered = steer(setting, self._speeds, self._steering, self._debts, self.core, seen.light, self._known, turn)
        self._known = {**self._known, **steered.known}
        return self._light(steered.placed)

    def _light(self, placed: Placed) -> Placed:
        return {place: count for place, count in placed.items() if not self._setting.services[place[1]].is_core}


class StaticAll(Corrected):
    """The same, decided once for what is expected and left so."""

    def slot(self, seen: Seen) -> Placed:
        return seen.light if self._first is None else super().slot(seen)


class RoundRobin(Measuring):
    """LBRR: as many instances as what comes asks for, one node after another, and requests in turn."""

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        super().__init__(scenario, found)
        self._turns: dict[str, int] = {}

    def slot(self, seen: Seen) -> Placed:
        setting = self.now(seen)
        return spread(setting, self._speeds, self.core, setting.nodes)

    def host(self, world: TierWorld, going: Going, service: str, inputs: Mapping[str, NodeId]) -> NodeId | None:
        hosts = world.hosts.get(service, ())
        turn = self._turns[service] = self._turns.get(service, -1) + 1
        return hosts[turn % len(hosts)] if hosts else None


class CloudOnly(Measuring):
    """Everything in the cloud, which has plenty of all and is far away."""

    def __init__(self, scenario: TwoTierScenario, found: Drawn) -> None:
        super().__init__(scenario, found)
        load = load_of(found.setting)
        self.core = {
            (CLOUD, name): ceil(load[name] * found.speeds.share(kind) / BUSY) or 1
            for name, kind in found.setting.services.items()
            if kind.is_core
        }

    def slot(self, seen: Seen) -> Placed:
        return spread(self.now(seen), self._speeds, self.core, [CLOUD])


def spread(setting: Setting, speeds: Speeds, core: Placed, nodes: Sequence[NodeId]) -> Placed:
    """As many light instances as what comes asks for, each on the next of `nodes` that has room."""
    free = setting.room(core)

    def takes(node: NodeId, name: str) -> bool:
        needs = setting.services[name].needs
        if any(free[node].get(key, 0.0) < need for key, need in needs.items()):
            return False
        for key, need in needs.items():
            free[node][key] -= need
        return True

    placed: dict[tuple[NodeId, str], int] = {}
    load, turn = load_of(setting), 0
    for name, kind in setting.services.items():
        if kind.is_core:
            continue
        for _ in range(max(1, ceil(load[name] * speeds.share(kind) / BUSY))):
            for step in range(len(nodes)):
                node = nodes[(turn + step) % len(nodes)]
                if takes(node, name):
                    placed[node, name] = placed.get((node, name), 0) + 1
                    turn += step + 1
                    break
    return placed

"""PURE: where core services go, by an integer program (`mathematics.md`, B2).

How many instances of each service each node has, at the least cost of keeping them and of the way requests take to
them; so that resources suffice and some are left for light services, so that what is left after any node, or any site,
has failed still does the work, and so that no service hangs on too few nodes. In the paper (arXiv 2601.19563)
diversity is counted over all services together, and no failure is survived by constraint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite, log

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from orchestrator.services.ahead import arrivals_ms
from orchestrator.services.problem import Setting
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

FAR_MS = 1e6
"""What a way costs that there is not, so that a program without better is still solved."""

NOTHING_LOST = frozenset[NodeId]()

Placed = Mapping[tuple[NodeId, str], int]
"""Instances, by node and service; none where it says nothing."""


@dataclass(frozen=True)
class Rules:
    """What a placement must keep."""

    capacity: Mapping[str, float]
    """By service: requests a slot that one instance does within its part of the deadline, on a node of speed 1."""
    replicas: Mapping[str, int]
    """By service: nodes that have it, at least."""
    survives_node: bool = True
    survives_site: bool = False
    survivors: frozenset[str] | None = None
    """The services that have to survive that; None: all."""
    before: Placed | None = None
    """What there is: an instance that is made anew costs what that costs. None: nothing costs that."""
    away_share: float | None = None
    """The probability that no node of a service is there must not exceed this."""
    reserve: float = 0.2
    """The share of each resource of a node that is left for light services."""
    latency_cost: float = 0.0
    """Of a millisecond on the way to a request's service, for each request in a slot."""


@dataclass(frozen=True)
class CorePlacement:
    """What the program found."""

    placed: Placed
    cost: float
    bound: float
    """No placement costs less."""

    @property
    def is_optimal(self) -> bool:
        return self.cost - self.bound <= 1e-6 * max(1.0, abs(self.cost))


@dataclass(frozen=True)
class _Index:
    """Columns of the program: instances, hosts (0 or 1), shares of the load, and where it is known what there was the
    instances that are new; each [node, service]."""

    nodes: tuple[NodeId, ...]
    services: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.nodes) * len(self.services)

    def instances(self, node: int, service: int) -> int:
        return node * len(self.services) + service

    def hosts(self, node: int, service: int) -> int:
        return self.size + self.instances(node, service)

    def share(self, node: int, service: int) -> int:
        return 2 * self.size + self.instances(node, service)

    def fresh(self, node: int, service: int) -> int:
        return 3 * self.size + self.instances(node, service)


class _Rows:
    """Constraints low <= sum of coefficient * column <= high, one after another."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, terms: Iterable[tuple[int, float]], low: float = -inf, high: float = inf) -> None:
        self._entries += [(len(self._low), column, value) for column, value in terms]
        self._low.append(low)
        self._high.append(high)

    def constraint(self, columns: int) -> LinearConstraint:
        rows, places, values = zip(*self._entries, strict=True)
        matrix = coo_array((values, (rows, places)), shape=(len(self._low), columns)).tocsr()
        return LinearConstraint(matrix, np.array(self._low), np.array(self._high))


def load_of(setting: Setting) -> Mapping[str, float]:
    """By service: requests a slot, of all streams."""
    found = dict.fromkeys(setting.services, 0.0)
    for stream in setting.streams:
        for name in setting.tasks[stream.task].after:
            found[name] += stream.per_slot
    return found


def place_core(setting: Setting, rules: Rules, time_limit_s: float = 60.0) -> CorePlacement:
    """The best placement of the core services.

    Raises `ResplitError(INFEASIBLE)` that names the rule which cannot be kept, INVALID_REQUEST where an instance does
    nothing, and INTERNAL where the time was too short for any placement.
    """
    for name, kind in setting.services.items():
        if kind.is_core and rules.capacity.get(name, 0.0) <= 0.0:
            message = f"an instance of {name!r} does {rules.capacity.get(name, 0.0):g} requests a slot; say more than 0"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "capacity")
    if not any(kind.is_core for kind in setting.services.values()):
        return CorePlacement({}, 0.0, 0.0)
    found = _solved(setting, rules, time_limit_s)
    if found is None:
        raise ResplitError(ErrorCode.INFEASIBLE, _why(setting, rules, time_limit_s), "services")
    return found


def _solved(setting: Setting, rules: Rules, time_limit_s: float) -> CorePlacement | None:
    index = _Index(tuple(setting.hosts), tuple(name for name, kind in setting.services.items() if kind.is_core))
    load = load_of(setting)
    way = _way_ms(setting)
    rows = _Rows()
    columns = (3 if rules.before is None else 4) * index.size
    cost = np.zeros(columns)
    most = np.zeros(columns)
    for v, node in enumerate(index.nodes):
        host = setting.hosts[node]
        free = {name: amount * (1.0 - rules.reserve) for name, amount in host.has.items()}
        for m, name in enumerate(index.services):
            kind = setting.services[name]
            capacity = host.speed * rules.capacity[name]
            room = min((free.get(key, 0.0) / need for key, need in kind.needs.items() if need > 0.0), default=inf)
            room = min(room, kind.most) if kind.may_be_at(node) else 0.0
            count = float(int(min(room, max(1.0, _needed(load[name], capacity)) + 1e-9)))
            most[index.instances(v, m)], most[index.hosts(v, m)], most[index.share(v, m)] = count, 1.0, 1.0
            cost[index.instances(v, m)] = kind.keep_cost
            longer_ms = kind.mean_ms / host.speed - kind.mean_ms
            cost[index.share(v, m)] = rules.latency_cost * load[name] * (way[name, node] + longer_ms)
            if rules.before is not None:
                cost[index.fresh(v, m)], most[index.fresh(v, m)] = kind.deploy_cost, count
                there = float(rules.before.get((node, name), 0))
                rows.add([(index.instances(v, m), 1.0), (index.fresh(v, m), -1.0)], high=there)
            # A host has an instance, and instances are at hosts; a share is worked on by instances.
            rows.add([(index.instances(v, m), 1.0), (index.hosts(v, m), -1.0)], low=0.0)
            rows.add([(index.instances(v, m), 1.0), (index.hosts(v, m), -count)], high=0.0)
            rows.add([(index.share(v, m), load[name]), (index.instances(v, m), -capacity)], high=0.0)
            rows.add([(index.share(v, m), 1.0), (index.hosts(v, m), -1.0)], high=0.0)
        for key, amount in free.items():
            terms = [
                (index.instances(v, m), setting.services[n].needs.get(key, 0.0)) for m, n in enumerate(index.services)
            ]
            rows.add(terms, high=amount)
    for m, name in enumerate(index.services):
        every = range(len(index.nodes))
        rows.add([(index.share(v, m), 1.0) for v in every], low=1.0, high=1.0)
        rows.add([(index.hosts(v, m), 1.0) for v in every], low=float(rules.replicas.get(name, 1)))
        # On nodes that are alike in whole instances rather than in requests: the same placements, a tighter relaxation.
        alike = bool((setting.speeds == 1.0).all())
        does = load[name] / rules.capacity[name]
        fails = rules.survivors is None or name in rules.survivors
        for lost in _failures(setting, rules) if fails else (NOTHING_LOST,):
            left = [(index.instances(v, m), setting.speeds[v]) for v in every if index.nodes[v] not in lost]
            rows.add(left, low=_needed(load[name], rules.capacity[name]) if alike else does)
        if rules.away_share is not None:
            sure = [-log(max(setting.hosts[node].fails, 1e-12)) for node in index.nodes]
            rows.add([(index.hosts(v, m), sure[v]) for v in every], low=-log(rules.away_share))
    whole = np.concatenate([np.ones(2 * index.size), np.zeros(columns - 2 * index.size)])
    answer = milp(
        cost,
        integrality=whole,
        bounds=Bounds(np.zeros_like(most), most),
        constraints=rows.constraint(columns),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if answer.status == 2:
        return None
    if answer.x is None:
        message = f"no placement of {len(index.services)} core services was found in {time_limit_s:g} s; give it more"
        raise ResplitError(ErrorCode.INTERNAL, message, "services")
    placed = {
        (node, name): round(answer.x[index.instances(v, m)])
        for v, node in enumerate(index.nodes)
        for m, name in enumerate(index.services)
        if round(answer.x[index.instances(v, m)])
    }
    return CorePlacement(placed, float(answer.fun), float(answer.mip_dual_bound))


def _needed(load: float, capacity: float) -> float:
    """Instances."""
    return float(np.ceil(load / capacity - 1e-9))


def _failures(setting: Setting, rules: Rules) -> Iterable[frozenset[NodeId]]:
    """Whatever may be away at once; nothing, at first."""
    yield NOTHING_LOST
    if rules.survives_node:
        yield from (frozenset({node}) for node in setting.hosts)
    if rules.survives_site:
        for site in sorted({host.site for host in setting.hosts.values()}):
            yield frozenset(node for node, host in setting.hosts.items() if host.site == site)


def _way_ms(setting: Setting) -> Mapping[tuple[str, NodeId], float]:
    """By service and node: when its inputs can be there, on the mean of the requests that use it."""
    sums: dict[tuple[str, NodeId], float] = {}
    load = load_of(setting)
    for stream in setting.streams:
        for (name, node), at_ms in arrivals_ms(setting, stream).items():
            share = stream.per_slot / load[name] if load[name] > 0.0 else 0.0
            way = at_ms if isfinite(at_ms) else FAR_MS
            sums[name, node] = sums.get((name, node), 0.0) + share * way
    return {(name, node): sums.get((name, node), 0.0) for name in setting.services for node in setting.hosts}


def _why(setting: Setting, rules: Rules, time_limit_s: float) -> str:
    """Which rule it is that cannot be kept."""
    relaxed = {
        "the loss of a whole site": replace(rules, survives_site=False),
        "the loss of a node": replace(rules, survives_site=False, survives_node=False),
        "how seldom a service may be away": replace(rules, away_share=None),
        "how many nodes are to have a service": replace(rules, replicas={}),
        "what is kept for light services": replace(rules, reserve=0.0),
    }
    for what, without in relaxed.items():
        if without != rules and _solved(setting, without, time_limit_s) is not None:
            return f"the core services fit on the nodes, but not with the rule about {what}; relax it or add nodes"
    free = replace(rules, survives_site=False, survives_node=False, away_share=None, replicas={}, reserve=0.0)
    for name, kind in setting.services.items():
        if not kind.is_core:
            continue
        alone = {other: replace(one, is_core=other == name) for other, one in setting.services.items()}
        if _solved(replace(setting, services=alone), free, time_limit_s) is None:
            load = load_of(setting)[name]
            return (
                f"{name!r} alone, with {load:g} requests a slot, needs more than all nodes have; add nodes or send less"
            )
    return "the core services need more than the nodes have; add nodes or send less"

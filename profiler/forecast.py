"""PURE: what a whole placement would cost: the routes that share a deployment's requests, taken together.

Requests go to where they end first, so that routes share them as their predicted ends do once the waits that the shares
make are in them; every latency is a mean weighted by these shares (mathematics.md A1, one term for each route). A node
that serves two routes bears the load of both.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from profiler.cost import ALONE, PROMPT_TOKENS, Estimate, Waiting, end_to_end_ms, estimate, memory_on, waiting_of
from profiler.course import Course, Work, course_of, links_busy_ms, loads_of, work_of
from profiler.host import Hosts
from profiler.kv import kv_tokens
from profiler.objective import Demand, Objective, Weights, exposure, imbalance, upkeep
from profiler.sizes import sizes_of
from profiler.waiting import share_processors
from schemas.base import NodeId
from schemas.deployment import Placement, Settings, blocks_by_node
from schemas.manifest import Manifest
from schemas.slo import Slo

PULL = 4.0
"""A route that ends requests in half the time takes so many powers of two more of them: ingresses send each to where
they think that it ends first, and they are not always right."""
ROUNDS = 5
"""Until shares and the waits that they make agree within some per cent."""
BUSY_MS_MIN = 1e-6
"""A route that takes no time at all is as fast as this."""


@dataclass(frozen=True)
class Forecast:
    """What a placement is predicted to cost, and the routes it is made of."""

    routes: tuple[Estimate, ...]
    shares: tuple[float, ...]
    """Of the requests that each route takes: ingresses send each to where it will end first. They add up to 1."""
    speeds: tuple[float, ...]
    """Of the throughput of all routes, what each has; they add up to 1."""
    imbalance: float
    """U of mathematics.md A1, over all nodes of the placement."""
    price_per_hour: float
    """Of its nodes, each once."""
    copies: float
    """Bytes of weights that its nodes hold, over the bytes of the model."""

    @property
    def ttft_ms(self) -> float:
        return sum(share * route.ttft_ms for share, route in self._parts())

    @property
    def tpot_ms(self) -> float:
        return sum(share * route.tpot_ms for share, route in self._parts())

    @property
    def e2e_ms(self) -> float:
        return sum(share * route.e2e_ms for share, route in self._parts())

    @property
    def output_tokens(self) -> int | None:
        return self.routes[0].output_tokens

    def objective(self, latency_ref_ms: float, weights: Weights) -> Objective:
        """Phi against a reference latency; raises INVALID_REQUEST for one that is not above 0."""
        parts = [(share, route.objective(latency_ref_ms, weights)) for share, route in self._parts()]
        return Objective(
            latency=sum(share * part.latency for share, part in parts),
            balance=weights.beta * self.imbalance,
            privacy=sum(share * part.privacy for share, part in parts),
            cost=upkeep([self.price_per_hour], self.copies, weights),
        )

    def missing(self, slo: Slo | None) -> float:
        """The share of requests that is predicted to miss a target of a class."""
        return 0.0 if slo is None else sum(share * route.missing(slo) for share, route in self._parts())

    def of_promised(self, slo: Slo | None) -> float:
        """How many times what a class promises requests take on average."""
        return 0.0 if slo is None else sum(share * route.of_promised(slo) for share, route in self._parts())

    @property
    def terms(self) -> dict[str, float]:
        """What an audit event or a status shows of it; with several routes also how many there are."""
        parts = [(share, route.terms) for share, route in self._parts()]
        named = [name for name in parts[0][1] if all(name in terms for _, terms in parts)]
        shown = {name: sum(share * terms[name] for share, terms in parts) for name in named}
        if len(parts) > 1:
            shown["load_max"] = max(terms["load_max"] for _, terms in parts)
            shown["bottleneck_ms"] = 1 / sum(1 / max(terms["bottleneck_ms"], BUSY_MS_MIN) for _, terms in parts)
            shown["routes"] = len(parts)
        if self.price_per_hour:
            shown["price_per_hour"] = self.price_per_hour
        return {name: round(value, 3) for name, value in shown.items()}

    def _parts(self) -> Iterator[tuple[float, Estimate]]:
        return zip(self.shares, self.routes, strict=True)


def forecast(
    placement: Placement,
    hosts: Hosts,
    manifest: Manifest,
    prompt_tokens: int = PROMPT_TOKENS,
    *,
    demand: Demand = ALONE,
    settings: Settings | None = None,
    weights: Weights | None = None,
    trusted: frozenset[NodeId] | None = None,
    steady: Hosts | None = None,
) -> Forecast:
    """What sequences on `placement` meet under `demand`, which is that of the whole deployment.

    Every node must be in `hosts`; the other arguments are those of `profiler.cost.predict`. `steady` are the same
    nodes as measured over a longer time, for loads and queues: near saturation a queue makes much of little noise.
    """
    ground = surveyed(placement, hosts, manifest, steady)
    return forecast_on(ground, prompt_tokens, demand=demand, settings=settings, weights=weights, trusted=trusted)


@dataclass(frozen=True, eq=False)
class Ground:
    """The routes of a placement on nodes as they are: what does not depend on the demand."""

    placement: Placement
    manifest: Manifest
    now: tuple[Course, ...]
    calm: tuple[Course, ...]
    """The same over a longer time."""
    shares: tuple[float, ...]


def surveyed(placement: Placement, hosts: Hosts, manifest: Manifest, steady: Hosts | None = None) -> Ground:
    """The ground of a forecast, where the same placement is to be looked at under many demands."""
    now = _courses(placement, hosts, manifest)
    calm = now if steady is None else _courses(placement, steady, manifest)
    return Ground(placement, manifest, now, calm, _speed_shares(now))


def forecast_on(
    ground: Ground,
    prompt_tokens: int = PROMPT_TOKENS,
    *,
    demand: Demand = ALONE,
    settings: Settings | None = None,
    weights: Weights | None = None,
    trusted: frozenset[NodeId] | None = None,
) -> Forecast:
    """The forecast of a placement that was surveyed."""
    manifest, now, calm = ground.manifest, ground.now, ground.calm

    def works(courses: Sequence[Course], parts: Sequence[float]) -> list[Work]:
        return [
            work_of(course, prompt_tokens, _share_of(demand, part), settings)
            for course, part in zip(courses, parts, strict=True)
        ]

    def held_up(
        shares: tuple[float, ...],
    ) -> tuple[tuple[float, ...], list[Work], dict[NodeId, float], list[Waiting]]:
        alone = works(calm, shares)
        loads = _added(loads_of(course, work) for course, work in zip(calm, alone, strict=True))
        felt = _felt(now, alone, shares)
        company = alone if felt == shares else works(calm, felt)
        return felt, company, loads, [waiting_of(*one, loads) for one in zip(calm, company, strict=True)]

    shares = ground.shares
    for _ in range(ROUNDS if len(shares) > 1 else 0):
        _, company, _, waiting = held_up(shares)
        taken = [end_to_end_ms(*one) for one in zip(calm, company, waiting, strict=True)]
        shares = _drawn(shares, taken)
    felt, company, loads, waiting = held_up(shares)
    if calm is not now:
        # The compute of now, with the waits of the longer time; chunks overlap as those of now do.
        company = works(now, felt)
        overlaps = [waiting_of(course, work, loads).overlap_ms for course, work in zip(now, company, strict=True)]
        waiting = [replace(one, overlap_ms=ms) for one, ms in zip(waiting, overlaps, strict=True)]
    weights = weights or Weights()
    cached_tokens = None if settings is None else kv_tokens(settings)
    routes = tuple(
        estimate(
            course,
            work,
            loads,
            queued,
            memory_bytes=memory_on(course, manifest, cached_tokens),
            imbalance=imbalance([loads[node] for node in course.nodes], weights),
            exposure=exposure(course.stages, len(manifest.blocks), trusted),
        )
        for course, work, queued in zip(now, company, waiting, strict=True)
    )
    return Forecast(
        routes,
        shares,
        ground.shares,
        imbalance(list(loads.values()), weights),
        sum({node: host.capacity.price_per_hour for course in now for node, host in course.at()}.values()),
        copies(ground.placement, manifest),
    )


def shared_out(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """`total` in whole parts in proportion to `shares`, at least 1 each; there must be no more shares than that."""
    assert len(shares) <= total
    exact = [share * (total - len(shares)) for share in shares]
    parts = [1 + int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return tuple(parts)


def copies(placement: Placement, manifest: Manifest) -> float:
    """Bytes of weights that the nodes of a placement hold, each block once a node, over the bytes of the model."""
    weight_bytes = sizes_of(manifest).weight_bytes
    held = blocks_by_node(placement)
    whole = sum(weight_bytes)
    return sum(sum([weight_bytes[block] for block in own]) for own in held.values()) / whole if whole else 1.0


def _courses(placement: Placement, hosts: Hosts, manifest: Manifest) -> tuple[Course, ...]:
    return tuple([course_of(chain, chain[0].node, hosts, manifest) for chain in placement])


def _speed_shares(courses: Sequence[Course]) -> tuple[float, ...]:
    """The share of each route in the requests: its throughput over that of all. A node on several routes gives each
    an equal part of its time."""
    if len(courses) == 1:
        return (1.0,)
    uses = Counter(node for course in courses for node in course.nodes)
    slowest = []
    for course in courses:
        work = work_of(course, PROMPT_TOKENS, ALONE, None)
        nodes = [uses[node] * busy_ms for node, busy_ms in work.busy_ms.items()]
        slowest.append(max(BUSY_MS_MIN, *nodes, *links_busy_ms(course, work).values()))
    total = sum(1 / ms for ms in slowest)
    return tuple(1 / ms / total for ms in slowest)


def _felt(courses: Sequence[Course], works: Sequence[Work], shares: tuple[float, ...]) -> tuple[float, ...]:
    """The share of the requests that hold each route up: its own, and of another route's as much as that one does on
    the same nodes or processors, where a route more is no processor more."""
    if len(courses) == 1:
        return shares

    nodes = [[host.capacity for _, host in course.at()] for course in courses]

    def overlap(one: int, other: int) -> float:
        busy = works[other].busy_ms.values()
        shared_ms = sum(
            [
                ms
                for theirs, ms in zip(nodes[other], busy, strict=True)
                if any(share_processors(mine, theirs) for mine in nodes[one])
            ]
        )
        return shared_ms / max(sum(busy), BUSY_MS_MIN)

    return tuple(
        min(1.0, sum([part if one == other else part * overlap(one, other) for other, part in enumerate(shares)]))
        for one in range(len(courses))
    )


def _drawn(shares: tuple[float, ...], taken_ms: Sequence[float]) -> tuple[float, ...]:
    """The shares after some requests have gone to where they end sooner."""
    least = min(taken_ms)
    drawn = [(least / max(ms, BUSY_MS_MIN)) ** PULL for ms in taken_ms]
    whole = sum(drawn)
    return tuple((share + one / whole) / 2 for share, one in zip(shares, drawn, strict=True))


def _share_of(demand: Demand, share: float) -> Demand:
    if share == 1.0:
        return demand
    batch = max(1.0, demand.batch * share)
    return Demand(demand.requests_per_s * share, demand.output_tokens, batch, demand.ahead_tokens)


def _added(loads: Iterable[Mapping[NodeId, float]]) -> dict[NodeId, float]:
    found: dict[NodeId, float] = {}
    for one in loads:
        for node, rho in one.items():
            found[node] = found.get(node, 0.0) + rho
    return found

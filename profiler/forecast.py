"""PURE: what a whole placement would cost: the routes that share a deployment's requests, taken together.

Requests are split over the routes in proportion to their speed, so every latency is a mean weighted by these shares
(mathematics.md A1, one term for each route). A node that serves two routes bears the load of both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from profiler.cost import ALONE, PROMPT_TOKENS, Estimate, predict
from profiler.objective import Demand, Objective, Weights, imbalance, upkeep
from profiler.waiting import share_processors
from schemas.base import Digest, NodeId
from schemas.capacity import Capacity
from schemas.deployment import Chain, Placement, Settings
from schemas.manifest import Manifest
from schemas.plan import Route

BUSY_MS_MIN = 1e-6
"""A route that takes no time at all is as fast as this."""


@dataclass(frozen=True)
class Forecast:
    """What a placement is predicted to cost, and the routes it is made of."""

    routes: tuple[Estimate, ...]
    shares: tuple[float, ...]
    """Of the requests that each route takes; they add up to 1."""
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
    capacities: Mapping[NodeId, Capacity],
    manifest: Manifest,
    digest: Digest,
    prompt_tokens: int = PROMPT_TOKENS,
    *,
    demand: Demand = ALONE,
    settings: Settings | None = None,
    weights: Weights | None = None,
    trusted: frozenset[NodeId] | None = None,
    steady: Mapping[NodeId, Capacity] | None = None,
) -> Forecast:
    """What sequences on `placement` meet under `demand`, which is that of the whole deployment.

    Every node must be in `capacities`; the other arguments are those of `profiler.cost.predict`. `steady` are the same
    nodes as measured over a longer time, for loads and queues: near saturation a queue makes much of little noise.
    """
    routes = [_route(chain) for chain in placement]
    shares = speed_shares(placement, capacities, manifest, digest) if len(routes) > 1 else (1.0,)

    def predicted(
        number: int, seen: Mapping[NodeId, Capacity], parts: Sequence[float], loads: Mapping[NodeId, float] | None
    ) -> Estimate:
        return predict(
            routes[number],
            seen,
            manifest,
            digest,
            prompt_tokens,
            demand=_share_of(demand, parts[number]),
            settings=settings,
            weights=weights,
            trusted=trusted,
            loads=loads,
        )

    found = [predicted(number, steady or capacities, shares, None) for number in range(len(routes))]
    loads, felt = _loads(found), _felt(found, shares, capacities)
    if len(routes) > 1:
        found = [predicted(number, steady or capacities, felt, loads) for number in range(len(routes))]
    if steady is not None:
        found = [_queueing(predicted(number, capacities, felt, loads), calm) for number, calm in enumerate(found)]
    return Forecast(
        tuple(found),
        shares,
        imbalance(list(loads.values()), weights or Weights()),
        sum(capacities[node].price_per_hour for node in loads),
        copies(placement, manifest),
    )


def speed_shares(
    placement: Placement, capacities: Mapping[NodeId, Capacity], manifest: Manifest, digest: Digest
) -> tuple[float, ...]:
    """The share of each route in the requests: its throughput over that of all. A node on several routes gives each
    an equal part of its time."""
    estimates = [predict(_route(chain), capacities, manifest, digest) for chain in placement]
    uses: dict[NodeId, int] = {}
    for estimate in estimates:
        for node in estimate.nodes:
            uses[node.node] = uses.get(node.node, 0) + 1
    slowest = [
        max(estimate.bottleneck_ms, *(uses[node.node] * node.busy_ms for node in estimate.nodes), BUSY_MS_MIN)
        for estimate in estimates
    ]
    total = sum(1 / ms for ms in slowest)
    return tuple(1 / ms / total for ms in slowest)


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
    held = {(stage.node, block) for chain in placement for stage in chain for block in stage.blocks}
    whole = sum(block.weight_bytes for block in manifest.blocks)
    return sum(manifest.blocks[block].weight_bytes for _, block in held) / whole if whole else 1.0


def _route(chain: Chain) -> Route:
    return Route(index=0, source=chain[0].node, stages=chain, max_sequences=1)


def _felt(
    estimates: Sequence[Estimate], shares: Sequence[float], capacities: Mapping[NodeId, Capacity]
) -> tuple[float, ...]:
    """The share of the requests that hold each route up: its own, and of another route's as much as that one does on
    the same nodes or processors, where a route more is no processor more."""

    def overlap(one: Estimate, other: Estimate) -> float:
        shared_ms = sum(
            theirs.busy_ms
            for theirs in other.nodes
            if any(share_processors(capacities[mine.node], capacities[theirs.node]) for mine in one.nodes)
        )
        return shared_ms / max(sum(theirs.busy_ms for theirs in other.nodes), BUSY_MS_MIN)

    return tuple(
        min(
            1.0,
            sum(
                part if one is other else part * overlap(one, other)
                for other, part in zip(estimates, shares, strict=True)
            ),
        )
        for one in estimates
    )


def _share_of(demand: Demand, share: float) -> Demand:
    if share == 1.0:
        return demand
    return Demand(demand.requests_per_s * share, demand.output_tokens, max(1.0, demand.batch * share))


def _queueing(now: Estimate, calm: Estimate) -> Estimate:
    """The compute of one estimate with the loads and waits of another of the same route."""
    return replace(
        now,
        stages=tuple(
            replace(a, wait_ms=b.wait_ms, prefill_wait_ms=b.prefill_wait_ms)
            for a, b in zip(now.stages, calm.stages, strict=True)
        ),
        nodes=tuple(replace(a, rho=b.rho, wait_ms=b.wait_ms) for a, b in zip(now.nodes, calm.nodes, strict=True)),
    )


def _loads(estimates: Sequence[Estimate]) -> dict[NodeId, float]:
    found: dict[NodeId, float] = {}
    for estimate in estimates:
        for node in estimate.nodes:
            found[node.node] = found.get(node.node, 0.0) + node.rho
    return found

"""PURE: what plans cost now, and what they would were one of their nodes slow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.conditions import Conditions
from orchestrator.decision import Option, Origin
from orchestrator.moving import Placed
from orchestrator.risk import risks
from orchestrator.rooms import Room
from profiler.compute import CONTEXT, DECODE, TOKEN
from profiler.cost import PROMPT_TOKENS
from profiler.forecast import Forecast, forecast
from profiler.host import Host
from profiler.network import DEFAULT_RTT_MS
from profiler.objective import Demand, Weights
from profiler.waiting import chunks_of
from schemas.base import NodeId
from schemas.capacity import REFERENCE_CONTEXT_TOKENS
from schemas.deployment import Deployment, Placement, Settings, nodes_of
from schemas.manifest import Manifest, ModelKind


@dataclass(frozen=True)
class Priced:
    """A plan and its price, of which the risk is still to be told: it depends on what else there is to choose from."""

    option: Option
    placed: Placed
    slowed: Mapping[NodeId, float]
    """Its Phi were one of its nodes slow."""
    e2e_s: float
    """What a request takes on it."""


@dataclass(frozen=True)
class Pricing:
    """How the plans of one look are priced."""

    deployment: Deployment
    manifest: Manifest
    conditions: Conditions
    demand: Demand
    prompt_tokens: int
    trusted: frozenset[NodeId]
    latency_ref_ms: float
    weights: Weights

    def price(self, chains: Placement, origin: Origin, without: NodeId | None = None) -> Priced:
        """One plan; `without` is the node that a failover plan does without."""
        now = self.conditions.serving(chains)
        calm = self.conditions.steady(chains) if self.demand.requests_per_s else None
        found = self._forecast(chains, now, calm)
        slowings = {node: self.conditions.slowing(node) for node in nodes_of(chains)}
        slowed = {
            node: self._phi(self._forecast(chains, _slowed(now, node, factor), calm and _slowed(calm, node, factor)))
            for node, factor in slowings.items()
            if factor > 1
        }
        prefill_ms = sum(
            share * sum(stage.prefill_ms for stage in route.stages) / self.prompt_tokens
            for share, route in zip(found.shares, found.routes, strict=True)
        )
        slo = self.deployment.slo
        objective = found.objective(self.latency_ref_ms, self.weights)
        option = Option(chains, origin, objective, found.terms, without, found.missing(slo), found.of_promised(slo))
        return Priced(option, Placed(chains, prefill_ms, found.tpot_ms, found.shares), slowed, found.e2e_ms / 1e3)

    def missing(self, chains: Placement) -> float:
        """The share of requests that a plan is predicted to serve too late for the deployment's class."""
        calm = self.conditions.steady(chains) if self.demand.requests_per_s else None
        return self._forecast(chains, self.conditions.serving(chains), calm).missing(self.deployment.slo)

    def _phi(self, found: Forecast) -> float:
        return found.objective(self.latency_ref_ms, self.weights).phi

    def _forecast(self, chains: Placement, now: Mapping[NodeId, Host], calm: Mapping[NodeId, Host] | None) -> Forecast:
        return forecast(
            chains,
            now,
            self.manifest,
            self.prompt_tokens,
            demand=self.demand,
            settings=self.deployment.settings,
            weights=self.weights,
            trusted=self.trusted,
            steady=calm,
        )


def with_risk(priced: Sequence[Priced], load: float) -> list[tuple[Option, Placed]]:
    """All that there is to choose from, each with its risk. `load` is how many sequences run on average."""
    added = risks([one.option.phi for one in priced], [one.slowed for one in priced], load)
    return [
        (replace(one.option, objective=replace(one.option.objective, risk=risk)), one.placed)
        for one, risk in zip(priced, added, strict=True)
    ]


def _slowed(hosts: Mapping[NodeId, Host], node: NodeId, factor: float) -> Mapping[NodeId, Host]:
    """Nodes as they are, but for one that is slow."""
    return {**hosts, node: hosts[node].slower(factor)}


def latency_bound_ms(
    offered: Mapping[NodeId, Room],
    manifest: Manifest,
    demand: Demand,
    stages_min: int = 1,
    prompt_tokens: int = PROMPT_TOKENS,
    settings: Settings | None = None,
    strain: float = 1.0,
) -> float:
    """A latency L that no plan beats: every block on its fastest node, and the hops that memory makes unavoidable.

    LB0 of mathematics.md A2 without its network, plus one hop for each node beyond the first that the model
    needs to fit (or is to be cut over), plus the way back. What a node holds already counts on both sides: as memory
    that the model needs, and as memory that the node has for it. It holds for every route, so for all of them. All
    nodes are `strain` times slower than the rooms say.
    """
    if not offered:
        return 0.0
    settings = settings or Settings()
    chunks, last = chunks_of(prompt_tokens, settings.chunk_tokens)
    # A cache shorter than the one that times are quoted behind makes a step shorter, for each sequence in it.
    short = max(0.0, REFERENCE_CONTEXT_TOKENS - prompt_tokens - demand.output_tokens / 2)

    times = np.stack([room.host.times.ms for room in offered.values()])
    saved_ms = short * np.stack([room.host.times.rows_min for room in offered.values()]) * times[:, CONTEXT]
    decode_ms = strain * float(np.maximum(0.0, times[:, DECODE] - saved_ms).min(axis=0).sum())
    tokens = np.array([last if block.role == "head" else prompt_tokens for block in manifest.blocks])
    # As many chunks as may be in flight are computed at once, at best.
    prefill_ms = strain * float((tokens * times[:, TOKEN].min(axis=0)).sum()) / min(settings.pipeline_depth, chunks)
    whole = [max(need) for need in zip(*(room.need_bytes for room in offered.values()), strict=True)]
    need = sum(whole)
    nodes = 0
    for able in sorted((room.free_bytes + need - sum(room.need_bytes) for room in offered.values()), reverse=True):
        if need <= 0:
            break
        need -= able
        nodes += 1
    nodes = max(nodes, stages_min)
    measured = [link.rtt_ms for room in offered.values() for link in room.capacity.links]
    hops_ms = (nodes if nodes > 1 else 0) * min([DEFAULT_RTT_MS, *measured]) / 2
    if manifest.kind is not ModelKind.DECODER:
        return decode_ms + hops_ms
    steps = demand.output_tokens
    return (prefill_ms + (steps - 1) * decode_ms) / steps + hops_ms

"""PURE: what a route would cost, term by term (mathematics.md A1). Times in milliseconds.

The terms themselves are in `profiler.compute`, `profiler.network` and `profiler.memory`, how sequences hold each other
up in `profiler.waiting`, and what it all adds up to, Phi, in `profiler.objective`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from profiler.compute import block_time, measured_time, prompt_ms, step_ms
from profiler.memory import memory_bytes
from profiler.network import TOKEN_BYTES, boundary_bytes, hop_ms, links_of
from profiler.objective import (
    Demand,
    NodeTerm,
    Objective,
    Weights,
    energy_mj_per_token,
    exposure,
    imbalance,
    node_energy_mj,
    queue_wait_ms,
)
from profiler.waiting import StageWork, chunks_of, groups_in_flight, resources, waits
from schemas.base import Digest, NodeId
from schemas.capacity import REFERENCE_CONTEXT_TOKENS, Capacity
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Route

PROMPT_TOKENS = 128
"""The prompt for which a time to first token is quoted when nobody says another."""
ALONE = Demand()
"""One sequence that waits for nobody."""


@dataclass(frozen=True)
class StageTerm:
    """Compute of one stage: the whole prompt, and one decode step of the sequences that share it."""

    node: NodeId
    first: int
    last: int
    prefill_ms: float
    decode_ms: float
    measured: bool
    """True if every block of the stage was measured on this node, False if a roofline had to help."""
    wait_ms: float = 0.0
    """What a step waits for others before it runs; 0 for a sequence alone."""
    prefill_wait_ms: float = 0.0
    """What the prompt waits for others, over all of its chunks."""
    frame_ms: float = 0.0
    """What a frame costs the node beside its computation (`Capacity.frame_ms`)."""
    chunks: int = 1
    """Frames of the prompt."""


@dataclass(frozen=True)
class HopTerm:
    """Network from one stage to the next; the last one returns the token to the ingress."""

    source: NodeId
    target: NodeId
    prefill_ms: float
    decode_ms: float
    busy_ms: float = 0.0
    """How long one step occupies the link: its bytes over the rate, without the latency."""


@dataclass(frozen=True)
class Estimate:
    """What one route is predicted to cost, and every term it is the sum of."""

    stages: tuple[StageTerm, ...]
    hops: tuple[HopTerm, ...]
    nodes: tuple[NodeTerm, ...]
    """Load, memory and energy, each node once, in the order of the route."""
    output_tokens: int | None
    """Nout, by which TTFT is weighed against TPOT; None for a model that answers in one call."""
    imbalance: float
    """U of mathematics.md A1."""
    exposure: float
    """P of mathematics.md A1."""
    overlap_ms: float = 0.0
    """What stages do to different chunks of the prompt at the same time, which is taken off."""

    @property
    def ttft_ms(self) -> float:
        """Time from admission to the first token (mathematics.md A1)."""
        stages = sum(s.prefill_ms + s.prefill_wait_ms + s.chunks * s.frame_ms for s in self.stages)
        return stages + sum(hop.prefill_ms for hop in self.hops) - self.overlap_ms

    @property
    def tpot_ms(self) -> float:
        """Time per output token of one sequence; for a tensor model, the time of one call."""
        stages = sum(stage.decode_ms + stage.wait_ms + stage.frame_ms for stage in self.stages)
        return stages + sum(hop.decode_ms for hop in self.hops)

    @property
    def e2e_ms(self) -> float:
        """From the prompt to the last token: TTFT + (Nout-1)*TPOT."""
        if self.output_tokens is None:
            return self.tpot_ms
        return self.ttft_ms + (self.output_tokens - 1) * self.tpot_ms

    @property
    def latency_ms(self) -> float:
        """L: what a request takes per token of its answer, so that the prompt counts but does not rule."""
        return self.e2e_ms / (self.output_tokens or 1)

    @property
    def bottleneck_ms(self) -> float:
        """The busiest node or link per step."""
        links: dict[tuple[NodeId, NodeId], float] = {}
        for hop in self.hops:
            links[hop.source, hop.target] = links.get((hop.source, hop.target), 0.0) + hop.busy_ms
        return max(*(node.busy_ms for node in self.nodes), *links.values())

    @property
    def energy_mj(self) -> float | None:
        """Millijoules per token, or None while the power of a node is not known."""
        return energy_mj_per_token(self.nodes)

    def objective(self, latency_ref_ms: float, weights: Weights) -> Objective:
        """Phi against a reference latency L_ref; raises INVALID_REQUEST for one that is not above 0."""
        if not 0 < latency_ref_ms < float("inf"):
            message = f"the reference latency is {latency_ref_ms} ms; it must be a finite number above 0"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "latency_ref_ms")
        latency = weights.alpha * self.latency_ms / latency_ref_ms
        return Objective(latency, weights.beta * self.imbalance, weights.gamma * self.exposure)

    @property
    def terms(self) -> dict[str, float]:
        """What an audit event or a status shows of it."""
        shown = {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "bottleneck_ms": self.bottleneck_ms,
            "compute_ms": sum(stage.decode_ms for stage in self.stages),
            "network_ms": sum(hop.decode_ms for hop in self.hops),
            "wait_ms": sum(stage.wait_ms for stage in self.stages),
            "frame_ms": sum(stage.frame_ms for stage in self.stages),
            "prefill_ms": sum(stage.prefill_ms for stage in self.stages),
            "prefill_wait_ms": sum(stage.prefill_wait_ms for stage in self.stages) - self.overlap_ms,
            "load_max": max(node.rho for node in self.nodes),
        }
        if self.energy_mj is not None:
            shown["energy_mj"] = self.energy_mj
        return {name: round(value, 3) for name, value in shown.items()}


def predict(
    route: Route,
    capacities: Mapping[NodeId, Capacity],
    manifest: Manifest,
    digest: Digest,
    prompt_tokens: int = PROMPT_TOKENS,
    *,
    cached_tokens: int = 0,
    demand: Demand = ALONE,
    settings: Settings | None = None,
    weights: Weights | None = None,
    trusted: frozenset[NodeId] | None = None,
    power_w: Mapping[NodeId, float] | None = None,
    loads: Mapping[NodeId, float] | None = None,
) -> Estimate:
    """What a sequence on `route` meets under `demand`; every node of the route must be in `capacities`.

    `prompt_tokens` are those to compute, behind `cached_tokens` whose caches were kept. `settings` are needed for the
    memory of caches, and say how a prompt is cut into chunks and how many are in flight; `power_w` are watts while
    computing, None for what the nodes last said that they draw; `trusted` None means that every node is;
    `loads` is rho of nodes where it is known better than from this route and this moment alone: they serve others too.
    """
    settings_or_default = settings or Settings()
    decoder = manifest.kind is ModelKind.DECODER
    depth = settings_or_default.pipeline_depth if decoder else 1
    groups = groups_in_flight(demand.batch, depth) if decoder else 1
    rows = demand.batch / groups if decoder else 1.0
    chunks, last = chunks_of(prompt_tokens, settings_or_default.chunk_tokens) if decoder else (1, prompt_tokens)
    context = cached_tokens + prompt_tokens + demand.output_tokens / 2 if decoder else float(REFERENCE_CONTEXT_TOKENS)
    steps = demand.output_tokens if decoder else 1
    stages = []
    for stage in route.stages:
        capacity = capacities[stage.node]
        times = [block_time(capacity, manifest, digest, block) for block in stage.blocks]
        stages.append(
            StageTerm(
                stage.node,
                stage.first,
                stage.last,
                prefill_ms=sum(
                    prompt_ms(time, manifest.blocks[time.block], prompt_tokens, chunks, last) for time in times
                ),
                decode_ms=step_ms(times, rows, context),
                measured=all(measured_time(capacity, digest, block) is not None for block in stage.blocks),
                frame_ms=capacity.frame_ms or 0.0,
                chunks=chunks,
            )
        )
    hops = _hops(route, capacities, manifest, prompt_tokens, chunks, rows)
    drawn_w = _drawn_w(capacities) if power_w is None else power_w
    nodes = _nodes(route, stages, manifest, demand, steps, rows, settings, drawn_w, loads or {})
    overlap_ms = 0.0
    if decoder:
        stages, overlap_ms = _waiting(
            route, stages, hops, capacities, manifest, digest, demand, prompt_tokens, groups, depth, context
        )
        each = {name: sum(s.wait_ms for s in stages if s.node == name) for name in route.nodes}
        nodes = tuple(replace(node, wait_ms=each[node.node]) for node in nodes)
    else:
        calls = {node.node: node.wait_ms for node in nodes}
        stages = [replace(stage, wait_ms=calls[stage.node], prefill_wait_ms=calls[stage.node]) for stage in stages]
    return Estimate(
        tuple(stages),
        hops,
        nodes,
        steps if decoder else None,
        imbalance([node.rho for node in nodes], weights or Weights()),
        exposure(route.stages, len(manifest.blocks), trusted),
        overlap_ms,
    )


def _waiting(
    route: Route,
    stages: list[StageTerm],
    hops: tuple[HopTerm, ...],
    capacities: Mapping[NodeId, Capacity],
    manifest: Manifest,
    digest: Digest,
    demand: Demand,
    prompt_tokens: int,
    groups: int,
    depth: int,
    context: float,
) -> tuple[list[StageTerm], float]:
    """The stages with what sequences wait for each other there, and what chunks save by being in flight at once."""
    chunks = stages[0].chunks
    beside = demand.batch - 1
    work = [
        StageWork(
            resource,
            stage.decode_ms,
            stage.prefill_ms / chunks,
            step_ms([block_time(capacities[on.node], manifest, digest, b) for b in on.blocks], beside, context)
            if beside > 0
            else 0.0,
        )
        for stage, on, resource in zip(
            stages, route.stages, resources([NodeId(s.node) for s in route.stages], capacities), strict=True
        )
    ]
    frames_ms = sum(stage.frame_ms for stage in stages)
    found = waits(
        work,
        sum(hop.decode_ms for hop in hops) + frames_ms,
        sum(hop.prefill_ms for hop in hops) / chunks + frames_ms,
        chunks=chunks,
        depth=depth,
        groups=groups,
        ahead=demand.ahead_tokens / prompt_tokens,
        requests_per_s=demand.requests_per_s,
    )
    # Each stage has the part of a wait that its computation is of the route's.
    step, prompt = sum(stage.decode_ms for stage in stages), sum(stage.prefill_ms for stage in stages)

    def part(own: float, whole: float) -> float:
        return own / whole if whole > 0 else 1 / len(stages)

    waiting = [
        replace(
            stage,
            wait_ms=found.step_ms * part(stage.decode_ms, step),
            prefill_wait_ms=found.chunks_ms * part(stage.prefill_ms, prompt),
        )
        for stage in stages
    ]
    return waiting, found.overlap_ms


def _drawn_w(capacities: Mapping[NodeId, Capacity]) -> dict[NodeId, float]:
    return {name: capacity.power_w for name, capacity in capacities.items() if capacity.power_w is not None}


def _nodes(
    route: Route,
    stages: list[StageTerm],
    manifest: Manifest,
    demand: Demand,
    steps: int,
    rows: float,
    settings: Settings | None,
    power_w: Mapping[NodeId, float],
    loads: Mapping[NodeId, float],
) -> tuple[NodeTerm, ...]:
    """rho_n = lambda * sum over its blocks of (tP + Nout*tD/rows), and what follows from it; `rows` share a step."""
    found = []
    for node in dict.fromkeys(stage.node for stage in route.stages):
        own = [stage for stage in stages if stage.node == node]
        busy_ms = sum(stage.decode_ms for stage in own)
        prefill_ms = sum(stage.prefill_ms for stage in own) if manifest.kind is ModelKind.DECODER else 0.0
        share = rows if manifest.kind is ModelKind.DECODER else demand.batch
        rho = loads.get(node, demand.requests_per_s * (prefill_ms + steps * busy_ms / share) / 1e3)
        memory = None
        if settings is not None:
            blocks = {block for stage in route.stages if stage.node == node for block in stage.blocks}
            memory = sum(memory_bytes(manifest.blocks[block], settings) for block in blocks)
        wait_ms = queue_wait_ms(rho, busy_ms / len(own))
        found.append(NodeTerm(node, rho, wait_ms, busy_ms, memory, node_energy_mj(node, busy_ms / rows, power_w)))
    return tuple(found)


def _hops(
    route: Route,
    capacities: Mapping[NodeId, Capacity],
    manifest: Manifest,
    prompt_tokens: int,
    chunks: int,
    rows: float,
) -> tuple[HopTerm, ...]:
    """Every chunk is a message of its own and pays the latency; of the last stage only the last one brings a token."""
    links = links_of(capacities, map(NodeId, route.nodes))

    def hop(source: NodeId, target: NodeId, token_bytes: int, *, returns: bool = False) -> HopTerm:
        empty_ms, full_ms = (hop_ms(links, source, target, size) for size in (0, token_bytes))
        per_token_ms = full_ms - empty_ms
        prefill_ms = chunks * empty_ms + per_token_ms * (1 if returns else prompt_tokens)
        return HopTerm(source, target, prefill_ms, empty_ms + rows * per_token_ms, rows * per_token_ms)

    hops = []
    if route.source != route.stages[0].node:
        hops.append(hop(route.source, route.stages[0].node, TOKEN_BYTES))
    for stage, after in pairwise(route.stages):
        hops.append(hop(stage.node, after.node, boundary_bytes(manifest, stage.last)))
    last = route.stages[-1]
    hops.append(hop(last.node, route.source, boundary_bytes(manifest, last.last), returns=True))
    return tuple(hops)

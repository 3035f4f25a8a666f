"""PURE: what a route would cost, term by term (mathematics.md A1). Times in milliseconds.

The terms themselves are in `profiler.compute`, `profiler.network` and `profiler.memory`, what they make of a route in
`profiler.course`, how sequences hold each other up in `profiler.waiting`, and what it all adds up to, Phi, in
`profiler.objective`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

from profiler.course import Course, Work, course_of, loads_of, prefill_hop_ms, waits_of, work_of
from profiler.host import Hosts
from profiler.kv import kv_tokens
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
from profiler.sizes import sizes_of
from schemas.base import NodeId
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Route
from schemas.slo import Slo

PROMPT_TOKENS = 128
"""The prompt for which a time to first token is quoted when nobody says another."""
SURE = 0.06
"""A logistic of this width over the logarithm is a normal error of a tenth: what noise leaves of a prediction."""
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

    def of_promised(self, slo: Slo) -> float:
        """How many times what a class promises a request takes on average, by the target that is missed most."""
        targets = ((self.ttft_ms, slo.ttft_ms), (self.tpot_ms, slo.tpot_ms), (self.e2e_ms, slo.deadline_ms))
        return max((ms / target for ms, target in targets if target is not None), default=0.0)

    def missing(self, slo: Slo) -> float:
        """The share of requests that is predicted to miss a target of a class.

        What a prompt waits is taken to be distributed as in an M/M/1 queue: P(W > t) = rho * exp(-rho * t / w), where
        rho = w / (w + what it takes). What it takes is known to `SURE` alone, so that the step at the target is none.
        """
        wait_ms = sum(stage.prefill_wait_ms for stage in self.stages)
        targets = (
            (self.ttft_ms - wait_ms, slo.ttft_ms, wait_ms),
            (self.tpot_ms, slo.tpot_ms, 0.0),
            (self.e2e_ms - wait_ms, slo.deadline_ms, wait_ms),
        )
        return max((_late(takes_ms, waits_ms, target) for takes_ms, target, waits_ms in targets if target), default=0.0)

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
    hosts: Hosts,
    manifest: Manifest,
    prompt_tokens: int = PROMPT_TOKENS,
    *,
    cached_tokens: int = 0,
    demand: Demand = ALONE,
    settings: Settings | None = None,
    weights: Weights | None = None,
    trusted: frozenset[NodeId] | None = None,
    power_w: Mapping[NodeId, float] | None = None,
) -> Estimate:
    """What a sequence on `route` meets under `demand`; every node of its stages must be in `hosts`.

    `prompt_tokens` are those to compute, behind `cached_tokens` whose caches were kept. `settings` are needed for the
    memory of caches, and say how a prompt is cut into chunks and how many are in flight; `power_w` are watts while
    computing, None for what the nodes last said that they draw; `trusted` None means that every node is.
    """
    course = course_of(route.stages, route.source, hosts, manifest)
    work = work_of(course, prompt_tokens, demand, settings, cached_tokens)
    loads = loads_of(course, work)
    waiting = waiting_of(course, work, loads)
    return estimate(
        course,
        work,
        loads,
        waiting,
        memory_bytes=memory_on(course, manifest, None if settings is None else kv_tokens(settings)),
        imbalance=imbalance(list(loads.values()), weights or Weights()),
        exposure=exposure(route.stages, len(manifest.blocks), trusted),
        power_w=power_w,
    )


@dataclass(frozen=True, eq=False)
class Waiting:
    """What is added to what a route takes undisturbed; the first two have an entry for each stage."""

    step_ms: Sequence[float]
    prompt_ms: Sequence[float]
    overlap_ms: float


def waiting_of(course: Course, work: Work, loads: Mapping[NodeId, float]) -> Waiting:
    """What sequences wait for each other; a model that answers in one call queues at each node by itself."""
    if not course.decoder:
        calls = [0.0] * len(course.stages)
        for node, stages in course.nodes.items():
            for stage in stages:
                calls[stage] = queue_wait_ms(loads[node], work.busy_ms[node] / len(stages))
        return Waiting(calls, calls, 0.0)
    found = waits_of(course, work)
    return Waiting(
        _in_proportion(found.step_ms, work.decode_ms),
        _in_proportion(found.chunks_ms, work.prefill_ms),
        found.overlap_ms,
    )


def end_to_end_ms(course: Course, work: Work, waiting: Waiting) -> float:
    """What a request takes: `Estimate.e2e_ms` without its terms."""
    step_ms = sum(work.decode_ms) + sum(waiting.step_ms) + course.frames_ms
    step_ms += sum([hop.empty_ms + work.rows * hop.token_ms for hop in course.hops])
    if not course.decoder:
        return step_ms
    first_ms = sum(work.prefill_ms) + sum(waiting.prompt_ms) + work.chunks * course.frames_ms - waiting.overlap_ms
    first_ms += sum([prefill_hop_ms(hop, work) for hop in course.hops])
    return first_ms + (work.steps - 1) * step_ms


def memory_on(course: Course, manifest: Manifest, cached_tokens: int | None) -> dict[NodeId, int | None]:
    """Weights of the route's blocks on each of its nodes, and caches of so many tokens (`profiler.kv.kv_tokens`); None
    where nobody said how many."""
    if cached_tokens is None:
        return dict.fromkeys(course.nodes)
    sizes = sizes_of(manifest)
    found: dict[NodeId, int | None] = {}
    for node, stages in course.nodes.items():
        held = [slice(course.stages[stage].first, course.stages[stage].last + 1) for stage in stages]
        found[node] = sum(
            sum(sizes.loaded_bytes[part]) + cached_tokens * sum(sizes.kv_bytes_per_token[part]) for part in held
        )
    return found


def estimate(
    course: Course,
    work: Work,
    loads: Mapping[NodeId, float],
    waiting: Waiting,
    *,
    memory_bytes: Mapping[NodeId, int | None],
    imbalance: float,
    exposure: float,
    power_w: Mapping[NodeId, float] | None = None,
) -> Estimate:
    """Every term of a route, from what was found of it. `loads` is rho of its nodes: they may serve others too."""
    rows = work.rows
    stages = tuple(
        [
            StageTerm(
                stage.node,
                stage.first,
                stage.last,
                prefill_ms,
                decode_ms,
                host.measured.issuperset(stage.blocks),
                wait_ms,
                prefill_wait_ms,
                host.capacity.frame_ms or 0.0,
                work.chunks,
            )
            for stage, host, prefill_ms, decode_ms, wait_ms, prefill_wait_ms in zip(
                course.stages,
                course.hosts,
                work.prefill_ms,
                work.decode_ms,
                waiting.step_ms,
                waiting.prompt_ms,
                strict=True,
            )
        ]
    )
    nodes = []
    for node, own in course.nodes.items():
        busy_ms = work.busy_ms[node]
        # Of a call that queues at the node by itself every stage waits as long.
        wait_ms = sum([waiting.step_ms[stage] for stage in (own if course.decoder else own[:1])])
        watts = course.hosts[own[0]].capacity.power_w if power_w is None else power_w.get(node)
        energy_mj = node_energy_mj(busy_ms / rows, watts)
        nodes.append(NodeTerm(node, loads[node], wait_ms, busy_ms, memory_bytes[node], energy_mj))
    hops = [
        HopTerm(
            hop.source, hop.target, prefill_hop_ms(hop, work), hop.empty_ms + rows * hop.token_ms, rows * hop.token_ms
        )
        for hop in course.hops
    ]
    steps = work.steps if course.decoder else None
    return Estimate(stages, tuple(hops), tuple(nodes), steps, imbalance, exposure, waiting.overlap_ms)


def _late(takes_ms: float, waits_ms: float, target_ms: float) -> float:
    """The share of requests that is later than a target, if each takes so long and waits so long on average."""
    if takes_ms <= 0:
        return 0.0
    anyway = 1 / (1 + exp(min(log(target_ms / takes_ms) / SURE, 30.0)))
    if waits_ms <= 0:
        return anyway
    rho = waits_ms / (waits_ms + takes_ms)
    return anyway + (1 - anyway) * rho * exp(-rho * max(0.0, target_ms - takes_ms) / waits_ms)


def _in_proportion(whole_ms: float, parts_ms: Sequence[float]) -> list[float]:
    """Each stage has the part of a wait that its computation is of the route's."""
    total_ms = sum(parts_ms)
    if total_ms > 0:
        return [whole_ms * own_ms / total_ms for own_ms in parts_ms]
    return [whole_ms / len(parts_ms)] * len(parts_ms)

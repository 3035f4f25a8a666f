"""PURE: a route as the cost model computes with it (mathematics.md A1). Times in milliseconds.

What its nodes and links take is looked up once (`Course`); what sequences that run at once make of it, a `Work`, is
computed again for every demand that is tried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from profiler.compute import StageTimes
from profiler.host import Host, Hosts, links_between
from profiler.network import TOKEN_BYTES, Links, edge_ms
from profiler.objective import Demand
from profiler.sizes import sizes_of
from profiler.waiting import StageWork, Waits, chunks_of, groups_in_flight, resources, waits
from schemas.base import NodeId
from schemas.deployment import Chain, Settings
from schemas.manifest import Manifest, ModelKind


@dataclass(frozen=True)
class Hop:
    """From one stage to the next; the last one returns the token to the ingress."""

    source: NodeId
    target: NodeId
    empty_ms: float
    """However little crosses it."""
    token_ms: float
    """What each token adds, by its bytes."""
    returns: bool = False


@dataclass(frozen=True, eq=False)
class Course:
    """One route on nodes as they are now."""

    stages: Chain
    hosts: tuple[Host, ...]
    """One for each stage."""
    times: tuple[StageTimes, ...]
    hops: tuple[Hop, ...]
    resources: tuple[int, ...]
    """Stages of one number share processors."""
    nodes: Mapping[NodeId, tuple[int, ...]]
    """Its nodes, each once, in the order of the route, with the stages that each has."""
    decoder: bool

    def at(self) -> list[tuple[NodeId, Host]]:
        """Its nodes, each once."""
        return [(node, self.hosts[own[0]]) for node, own in self.nodes.items()]

    @property
    def frames_ms(self) -> float:
        return sum(host.capacity.frame_ms or 0.0 for host in self.hosts)


@dataclass(frozen=True, eq=False)
class Work:
    """What sequences take on a route while nothing holds them up; one entry for each stage."""

    demand: Demand
    prompt_tokens: int
    depth: int
    groups: int
    """Decode groups in flight."""
    rows: float
    """Sequences of one group."""
    chunks: int
    """Frames of the prompt."""
    steps: int
    prefill_ms: tuple[float, ...]
    """The whole prompt."""
    decode_ms: tuple[float, ...]
    """One decode step of one group."""
    beside_ms: tuple[float, ...]
    """One decode step of the sequences beside one that is prefilled; 0 if there are none."""
    busy_ms: Mapping[NodeId, float]
    """One decode step over all the stages of a node."""


def course_of(stages: Chain, source: NodeId, hosts: Hosts, manifest: Manifest) -> Course:
    """The route of these stages, driven by the ingress `source`; every node of a stage must be in `hosts`."""
    sizes = sizes_of(manifest)
    names = tuple(stage.node for stage in stages)
    own = tuple(hosts[name] for name in names)
    nodes: dict[NodeId, tuple[int, ...]] = {}
    for number, name in enumerate(names):
        nodes[name] = (*nodes.get(name, ()), number)
    return Course(
        stages,
        own,
        tuple(host.times.stage(stage.first, stage.last, sizes.heads) for host, stage in zip(own, stages, strict=True)),
        _hops(stages, source, links_between(hosts, (source, *nodes)), sizes.boundary_bytes),
        tuple(resources([host.capacity for host in own])),
        nodes,
        manifest.kind is ModelKind.DECODER,
    )


def work_of(
    course: Course, prompt_tokens: int, demand: Demand, settings: Settings | None, cached_tokens: int = 0
) -> Work:
    """What sequences of `demand` take; the settings say how a prompt is cut and how many chunks are in flight."""
    settings = settings or Settings()
    if not course.decoder:
        prefill_ms = tuple([times.prompt_ms(prompt_tokens, 1, prompt_tokens) for times in course.times])
        decode_ms = tuple([times.step_ms(1.0) for times in course.times])
        return Work(
            demand,
            prompt_tokens,
            1,
            1,
            1.0,
            1,
            1,
            prefill_ms,
            decode_ms,
            (0.0,) * len(decode_ms),
            _busy_ms(course, decode_ms),
        )
    depth = settings.pipeline_depth
    groups = groups_in_flight(demand.batch, depth)
    rows, beside = demand.batch / groups, demand.batch - 1
    chunks, last = chunks_of(prompt_tokens, settings.chunk_tokens)
    context = cached_tokens + prompt_tokens + demand.output_tokens / 2
    decode_ms = tuple([times.step_ms(rows, context) for times in course.times])
    return Work(
        demand,
        prompt_tokens,
        depth,
        groups,
        rows,
        chunks,
        demand.output_tokens,
        tuple([times.prompt_ms(prompt_tokens, chunks, last) for times in course.times]),
        decode_ms,
        tuple([times.step_ms(beside, context) if beside > 0 else 0.0 for times in course.times]),
        _busy_ms(course, decode_ms),
    )


def loads_of(course: Course, work: Work) -> dict[NodeId, float]:
    """rho_n = lambda * sum over its blocks of (tP + Nout*tD/batch), node by node."""
    found = {}
    for node, stages in course.nodes.items():
        prefill_ms = sum([work.prefill_ms[stage] for stage in stages]) if course.decoder else 0.0
        share = work.rows if course.decoder else work.demand.batch
        busy_ms = work.steps * work.busy_ms[node] / share
        found[node] = work.demand.requests_per_s * (prefill_ms + busy_ms) / 1e3
    return found


def waits_of(course: Course, work: Work) -> Waits:
    """What sequences of a model that generates wait for each other on the whole route."""
    frames_ms, chunks, rows = course.frames_ms, work.chunks, work.rows
    stages = [
        StageWork(resource, decode_ms, prefill_ms / chunks, beside_ms)
        for resource, decode_ms, prefill_ms, beside_ms in zip(
            course.resources, work.decode_ms, work.prefill_ms, work.beside_ms, strict=True
        )
    ]
    return waits(
        stages,
        sum([hop.empty_ms + rows * hop.token_ms for hop in course.hops]) + frames_ms,
        sum([prefill_hop_ms(hop, work) for hop in course.hops]) / chunks + frames_ms,
        chunks=chunks,
        depth=work.depth,
        groups=work.groups,
        ahead=work.demand.ahead_tokens / work.prompt_tokens,
        requests_per_s=work.demand.requests_per_s,
    )


def prefill_hop_ms(hop: Hop, work: Work) -> float:
    """A prompt over one hop. Every chunk is a message of its own and pays the latency; of the last stage only the
    last one brings a token."""
    return work.chunks * hop.empty_ms + hop.token_ms * (1 if hop.returns else work.prompt_tokens)


def links_busy_ms(course: Course, work: Work) -> dict[tuple[NodeId, NodeId], float]:
    """How long one step occupies each link of the route: its bytes over the rate, without the latency."""
    found: dict[tuple[NodeId, NodeId], float] = {}
    for hop in course.hops:
        found[hop.source, hop.target] = found.get((hop.source, hop.target), 0.0) + work.rows * hop.token_ms
    return found


def _busy_ms(course: Course, decode_ms: Sequence[float]) -> dict[NodeId, float]:
    return {node: sum([decode_ms[stage] for stage in own]) for node, own in course.nodes.items()}


def _hops(stages: Chain, source: NodeId, links: Links, boundary_bytes: tuple[int, ...]) -> tuple[Hop, ...]:
    def hop(here: NodeId, there: NodeId, size: int, *, returns: bool = False) -> Hop:
        latency_ms, byte_ms = edge_ms(links, here, there)
        return Hop(here, there, latency_ms, size * byte_ms, returns)

    first, last = stages[0], stages[-1]
    entry = [] if source == first.node else [hop(source, first.node, TOKEN_BYTES)]
    between = [hop(one.node, after.node, boundary_bytes[one.last]) for one, after in pairwise(stages)]
    return (*entry, *between, hop(last.node, source, boundary_bytes[last.last], returns=True))

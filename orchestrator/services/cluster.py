"""PURE: the nodes of a cluster and a pipeline's services, as the programs that place services see them.

A request is the unit of work, so that an instance works at so many requests a millisecond: by what the answers of
services showed, and before there were any by what a plan of one stage is predicted to take. Nodes differ by one factor
each, the mean over the services.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import exp, log, prod
from statistics import median

from orchestrator.fold import Snapshot
from orchestrator.rooms import Room, rooms
from orchestrator.services.core import Placed
from orchestrator.services.observed import Seen
from orchestrator.services.problem import SOURCE, Host, ServiceKind, Setting, Stream, TaskKind, Ways
from orchestrator.services.routing import Speeds
from orchestrator.trust import exposed
from profiler.effective_capacity import GammaService, Steady
from profiler.forecast import forecast
from profiler.memory import memory_bytes
from profiler.network import boundary_bytes, edge_ms, links_of
from schemas.base import NodeId
from schemas.deployment import Deployment, Stage
from schemas.manifest import Manifest, ModelKind
from schemas.pipeline import REQUEST, TEXT, Input, Pipeline, Task
from schemas.pipeline import Service as Spec

SLOT_MS = 50.0
"""In which arrivals and work are counted."""
OVERHEAD_MS = 5.0
"""Of asking one service: the bus there and back, and the journal."""
TEXT_BYTES = 1000
"""Of a text, until somebody knows better."""
STEADY_BELOW = 0.02
"""A squared coefficient of variation below this is none."""
BYTES_OF = {"16": 2, "32": 4, "64": 8}
MB = 1e6
MS_MIN = 0.05
"""No call takes less."""
COMPUTE, MEMORY = "compute", "memory"
"""The resources of a node: its time, in nodes of speed 1, and bytes."""
BUSY = 0.7
"""Of what an instance of a core service does on average, what it is given at most."""


@dataclass(frozen=True)
class Ground:
    """What services are placed on."""

    setting: Setting
    speeds: Speeds
    whole: frozenset[str]
    """Services of one stage, which are placed here; the others are planned as deployments that are cut."""
    capacity: Mapping[str, float]
    """By service: requests a slot that an instance is given at most, on a node of speed 1."""


def is_whole(spec: Spec) -> bool:
    """Whether a service is placed as one stage."""
    return spec.stages is None


def ground_of(
    snapshot: Snapshot,
    pipeline: Pipeline,
    services: Mapping[str, Deployment],
    streams: tuple[Stream, ...],
    standing: Placed,
    seen: Seen,
    strain: float = 1.0,
    *,
    now: datetime,
) -> Ground:
    """The nodes that new plans may use, and the services, as their deployments want them. Every model must be known.
    All is taken for `strain` times slower than it says, and a node that refused a service may not have it for a while.
    """
    manifests = {name: snapshot.manifests[deployment.model] for name, deployment in services.items()}
    found = {name: rooms(snapshot, services[name], manifests[name]) for name in pipeline.services}
    nodes = tuple(snapshot.offered)
    times = {
        name: _times_ms(name, spec, pipeline, found[name], manifests[name], seen)
        for name, spec in pipeline.services.items()
    }
    usual = {name: median(times[name].values()) if times[name] else 1.0 for name in times}
    speed = {
        node: exp(sum(log(usual[name] / times[name][node]) for name in times) / len(times)) / strain for node in nodes
    }
    whole = frozenset(name for name, spec in pipeline.services.items() if is_whole(spec))
    memory = {
        name: float(sum(memory_bytes(block, services[name].settings) for block in manifests[name].blocks))
        for name in whole
    }
    load = dict.fromkeys(pipeline.services, 0.0)
    for stream in streams:
        for name in pipeline.tasks[stream.task].steps:
            load[name] += stream.per_slot
    have = {name: sum(count for (_, one), count in standing.items() if one == name) for name in whole}
    capacity = {name: BUSY * SLOT_MS / usual[name] for name in usual}
    kinds = {
        name: ServiceKind(
            name=name,
            # What is cut is there and stays: to what is steered here it is like a core service.
            is_core=spec.kind == "core",
            needs=_needs(spec, load[name] * usual[name], have[name], memory[name]) if name in whole else {},
            work=1.0,
            output=boundary_bytes(manifests[name], len(manifests[name].blocks) - 1) / MB,
            rate=1.0 / usual[name],
            keep_cost=spec.keep_cost * SLOT_MS / 1e3,
            deploy_cost=spec.deploy_cost,
            least=spec.replicas,
            most=1.0,
            nodes=_allowed(services[name], manifests[name], found[name])
            - snapshot.rollout(services[name].name).shunned(now),
        )
        for name, spec in pipeline.services.items()
    }
    loaded = [(node, name) for node, name in standing if node in snapshot.rollout(services[name].name).nodes]
    hosts = {
        node: Host(
            node,
            snapshot.present[node].machine or node,
            {MEMORY: _memory(node, found, memory, loaded), COMPUTE: speed[node] * strain},
            speed=speed[node],
        )
        for node in nodes
    }
    setting = Setting(kinds, _tasks(pipeline), hosts, _ways(snapshot, nodes), streams)
    speeds = Speeds(SLOT_MS, {name: _server(name, usual[name], seen) for name in kinds})
    return Ground(setting, speeds, whole, capacity)


def _times_ms(
    name: str, spec: Spec, pipeline: Pipeline, found: Mapping[NodeId, Room], manifest: Manifest, seen: Seen
) -> dict[NodeId, float]:
    """What one request takes on each node: measured, else predicted and as far off as predictions were elsewhere."""
    hosts = {node: room.host for node, room in found.items()}
    last = len(manifest.blocks) - 1
    tokens = max((task.steps[name].max_tokens for task in pipeline.tasks.values() if name in task.steps), default=1)
    predicted = {}
    for node in hosts:
        ahead = forecast(((Stage(node=node, first=0, last=last),),), hosts, manifest, settings=spec.settings)
        whole = manifest.kind is ModelKind.DECODER
        predicted[node] = max(MS_MIN, ahead.ttft_ms + (tokens - 1) * ahead.tpot_ms if whole else ahead.tpot_ms)
    measured = {node: one.mean_ms for node in hosts if (one := seen.time(name, node)) is not None}
    off = median([measured[node] / predicted[node] for node in measured]) if measured else 1.0
    return {node: max(MS_MIN, measured.get(node, off * predicted[node])) for node in hosts}


def _server(name: str, usual_ms: float, seen: Seen) -> Steady | GammaService:
    """One instance, in requests a slot: of what a renewal process does in it the variance is the squared coefficient of
    variation times the mean."""
    mean = SLOT_MS / usual_ms
    known = [one for (service, _), one in seen.times.items() if service == name]
    answers = sum(one.answers for one in known)
    variation = sum(one.answers * one.variation for one in known) / answers if answers else 0.0
    return Steady(mean) if variation < STEADY_BELOW else GammaService(mean / variation, variation)


def _needs(spec: Spec, busy_ms: float, have: int, memory: float) -> dict[str, float]:
    """Of one instance: its memory, and its part of a node's time, `busy_ms` being what comes in a slot takes. Core ones
    are as many as is asked for; of light ones, of which there may be one more soon, two always fit on a node."""
    share = busy_ms / SLOT_MS / (spec.replicas if spec.kind == "core" else have + 1)
    return {MEMORY: memory, COMPUTE: min(share, 0.9 if spec.kind == "core" else 0.4)}


def _memory(
    node: NodeId,
    found: Mapping[str, Mapping[NodeId, Room]],
    memory: Mapping[str, float],
    loaded: Collection[tuple[NodeId, str]],
) -> float:
    """What services may take there: what is free, and what those take that a plan has put there."""
    free = min((one[node].free_bytes for one in found.values()), default=0)
    return free + sum(memory.get(name, 0.0) for at, name in loaded if at == node)


def _allowed(deployment: Deployment, manifest: Manifest, found: Mapping[NodeId, Room]) -> frozenset[NodeId]:
    secret = deployment.sensitive_of(len(manifest.blocks))
    every = range(len(manifest.blocks))
    return frozenset(node for node, room in found.items() if not exposed(secret, every, room.trusted))


def _tasks(pipeline: Pipeline) -> dict[str, TaskKind]:
    return {
        name: TaskKind(
            name,
            {service: tuple(sorted(_sources(task, service))) for service in task.order},
            sum(_bytes(one) for one in task.inputs.values()) / MB,
            task.slo.deadline_ms or 0.0,
        )
        for name, task in pipeline.tasks.items()
    }


def _sources(task: Task, service: str) -> frozenset[str]:
    return frozenset(SOURCE if one == REQUEST else one for one in task.steps[service].after)


def _bytes(one: Input) -> int:
    count = prod(max(1, size) for size in one.shape)
    if one.datatype == TEXT:
        return count * TEXT_BYTES
    return count * next((size for bits, size in BYTES_OF.items() if one.datatype.endswith(bits)), 1)


def _ways(snapshot: Snapshot, nodes: tuple[NodeId, ...]) -> Ways:
    links = links_of(snapshot.present)
    edges = {(a, b): edge_ms(links, a, b) for a in nodes for b in nodes if a != b}
    return Ways(
        {pair: 1.0 / (byte_ms * MB) for pair, (_, byte_ms) in edges.items()},
        {pair: latency_ms for pair, (latency_ms, _) in edges.items()},
    )


def depth(task: Task) -> int:
    """Services that a request passes one after another, at most."""
    found: dict[str, int] = {}
    for name in task.order:
        found[name] = 1 + max((found[before] for before in task.after[name]), default=0)
    return max(found.values())

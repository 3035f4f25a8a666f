"""PURE: what each node has room for, seen from one deployment.

A heartbeat shows memory as it was when it was sent. Blocks that a live plan put on a node and that the node
does not report as loaded yet are counted as taken, so two plans made within a second never share one gap.
A block of this very deployment that a node runs already is counted once (mathematics.md A5): a plan of the same model
and settings shares its weights and its caches; one of other settings shares the weights and has caches of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.beliefs import believed, optimism_of
from orchestrator.fold import Snapshot
from profiler.memory import kv_memory_bytes, weight_memory_bytes
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity
from schemas.deployment import Deployment
from schemas.manifest import Manifest
from schemas.plan import Plan


@dataclass(frozen=True)
class Room:
    """One node as the planner sees it."""

    capacity: Capacity
    free_bytes: int
    need_bytes: tuple[int, ...]
    """What each block of the model takes."""
    trusted: bool = True
    """Whether it may hold sensitive blocks."""


def rooms(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> dict[NodeId, Room]:
    """Every node that is present and not drained, by name, ascending."""
    found = {}
    weights = [weight_memory_bytes(block) for block in manifest.blocks]
    caches = [kv_memory_bytes(block, deployment.settings) for block in manifest.blocks]
    for name, capacity in snapshot.offered.items():
        free = max(0, capacity.memory_free_bytes - _promised_bytes(snapshot, name, capacity))
        loaded, cached = _held(snapshot, name, deployment)
        need = tuple(
            (0 if block in loaded else weight) + (0 if block in cached else cache)
            for block, (weight, cache) in enumerate(zip(weights, caches, strict=True))
        )
        found[name] = Room(capacity, free, need, snapshot.trusts(name))
    return found


def believed_rooms(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> dict[NodeId, Room]:
    """The same with a time for every block (`beliefs`): what was measured here and what a roofline promises there are
    not held against each other."""
    heard = {name: node.capacity for name, node in snapshot.nodes.items()}
    times = {name: node.times for name, node in snapshot.nodes.items()}
    outlook = snapshot.outlooks.get(deployment.name)
    before = None if outlook is None else outlook.optimism
    optimism = optimism_of(snapshot.present, times, manifest, deployment.model, before)
    seen = believed(heard, times, manifest, deployment.model, optimism)
    found = rooms(snapshot, deployment, manifest)
    return {name: replace(room, capacity=seen[name]) for name, room in found.items()}


def _held(snapshot: Snapshot, node: NodeId, deployment: Deployment) -> tuple[frozenset[int], frozenset[int]]:
    """Blocks whose weights, and blocks whose caches, live plans of the deployment have on a node already."""
    plans = [plan for plan in _plans_on(snapshot, node, deployment.name) if plan.model == deployment.model]
    loaded = frozenset(block for plan in plans for block in plan.blocks_on(node))
    alike = [plan for plan in plans if plan.settings == deployment.settings]
    return loaded, frozenset(block for plan in alike for block in plan.blocks_on(node))


def _promised_bytes(snapshot: Snapshot, node: NodeId, capacity: Capacity) -> int:
    """What live plans put on the node and its last heartbeat does not show as loaded."""
    loaded = {
        (stage.deployment, stage.model, block)
        for stage in capacity.stages
        if stage.state != "loading"
        for block in stage.blocks
    }
    promised: dict[tuple[DeploymentName, Digest, int], int] = {}
    for name in snapshot.rollouts:
        for plan in _plans_on(snapshot, node, name):
            manifest = snapshot.manifests.get(plan.model)
            for index in plan.blocks_on(node) if manifest is not None else ():
                assert manifest is not None
                key = (name, plan.model, index)
                block = manifest.blocks[index]
                size = weight_memory_bytes(block) + kv_memory_bytes(block, plan.settings)
                promised[key] = max(promised.get(key, 0), size)
    return sum(size for key, size in promised.items() if key not in loaded)


def _plans_on(snapshot: Snapshot, node: NodeId, deployment: DeploymentName) -> Iterable[Plan]:
    rollout = snapshot.rollouts.get(deployment)
    return [plan for plan in (rollout.plans if rollout is not None else ()) if node in plan.nodes]

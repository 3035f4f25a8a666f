"""PURE: what each node has room for, seen from one deployment.

A heartbeat shows memory as it was when it was sent. Blocks that a live plan put on a node and that the node
does not report as loaded yet are counted as taken, so two plans made within a second never share one gap.
A block of this very deployment that a node runs already is counted once (mathematics.md A5): a plan of the same model
and settings shares its weights and its caches; one of other settings shares the weights and has caches of its own. So
do other deployments whose models have the same block, as a base and its variants do: what they share is one session.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.beliefs import believed, optimism_of
from orchestrator.fold import Snapshot
from profiler.host import Host, Hosts, hosts_of
from profiler.kv import kv_tokens
from profiler.sizes import sizes_of
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity
from schemas.deployment import Deployment, Settings
from schemas.manifest import Manifest
from schemas.plan import Plan

Hosted = tuple[DeploymentName, Digest, int]
"""A block of a model as a deployment has it on a node."""


@dataclass(frozen=True)
class _Taken:
    """What a block takes: the session of its graph, which all blocks of that graph share, and what is its own."""

    graph: Digest
    session_bytes: int
    own_bytes: int
    """Its adapter and its caches."""


@dataclass(frozen=True)
class Room:
    """One node as the planner sees it."""

    host: Host
    free_bytes: int
    need_bytes: tuple[int, ...]
    """What each block of the model takes."""
    trusted: bool = True
    """Whether it may hold sensitive blocks."""

    @property
    def capacity(self) -> Capacity:
        return self.host.capacity


def rooms(
    snapshot: Snapshot, deployment: Deployment, manifest: Manifest, hosts: Hosts | None = None
) -> dict[NodeId, Room]:
    """Every node that is present and not drained, by name, ascending; as it says that it is, or as in `hosts`."""
    found = {}
    weights, caches = sizes_of(manifest).loaded_bytes, _cache_bytes(manifest, deployment.settings)
    whole = tuple(map(sum, zip(weights, caches, strict=True)))
    offered = snapshot.offered
    hosts = hosts_of(offered, manifest, deployment.model) if hosts is None else hosts
    free_bytes = unpromised_bytes(snapshot)
    shared = _shared(snapshot, deployment, manifest)
    adapters = sizes_of(manifest).adapter_bytes
    for name in offered:
        loaded, cached = _held(snapshot, name, deployment)
        beside = shared.get(name, frozenset())
        need = whole
        if loaded or beside:
            need = tuple(
                (0 if block in loaded else adapters[block] if block in beside else weight)
                + (0 if block in cached else cache)
                for block, (weight, cache) in enumerate(zip(weights, caches, strict=True))
            )
        found[name] = Room(hosts[name], free_bytes[name], need, snapshot.trusts(name))
    return found


def unpromised_bytes(snapshot: Snapshot) -> dict[NodeId, int]:
    """What each node that a plan may use has free, less what live plans put there that it does not report yet."""
    promised = _promised(snapshot)
    return {
        name: max(0, capacity.memory_free_bytes - _missing_bytes(promised.get(name, {}), capacity))
        for name, capacity in snapshot.offered.items()
    }


def taken_bytes(snapshot: Snapshot, names: Collection[DeploymentName]) -> dict[NodeId, int]:
    """What the plans in force of these deployments take of each node's memory, what they share once."""
    found: dict[NodeId, dict[Hosted, _Taken]] = {}
    for name in names:
        current = snapshot.rollout(name).current
        if current is not None:
            _add(found, name, current, snapshot)
    return {node: _sum(here.values()) for node, here in found.items()}


def at_hand(rooms: Mapping[NodeId, Room], model: Digest) -> dict[NodeId, Room]:
    """The rooms for blocks alone that the nodes have loaded or on their disks; none where they have all of them."""
    found = {}
    for name, room in rooms.items():
        stored = frozenset[int]().union(*(one.blocks for one in room.capacity.on_disk if one.model == model))
        need = tuple(
            size if block in stored or not size else max(size, room.free_bytes + 1)
            for block, size in enumerate(room.need_bytes)
        )
        found[name] = replace(room, need_bytes=need)
    return found if any(found[name].need_bytes != room.need_bytes for name, room in rooms.items()) else {}


def believed_rooms(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> dict[NodeId, Room]:
    """The same with a time for every block (`beliefs`): what was measured here and what a roofline promises there are
    not held against each other."""
    heard = {name: node.capacity for name, node in snapshot.nodes.items()}
    times = {name: node.times for name, node in snapshot.nodes.items()}
    outlook = snapshot.outlooks.get(deployment.name)
    before = None if outlook is None else outlook.optimism
    optimism = optimism_of(snapshot.present, times, manifest, deployment.model, before)
    seen = believed(heard, times, manifest, deployment.model, optimism)
    return rooms(snapshot, deployment, manifest, seen)


def _held(snapshot: Snapshot, node: NodeId, deployment: Deployment) -> tuple[frozenset[int], frozenset[int]]:
    """Blocks whose weights, and blocks whose caches, live plans of the deployment have on a node already."""
    plans = [plan for plan in _plans_on(snapshot, node, deployment.name) if plan.model == deployment.model]
    loaded = frozenset(block for plan in plans for block in plan.blocks_on(node))
    alike = [plan for plan in plans if plan.settings == deployment.settings]
    return loaded, frozenset(block for plan in alike for block in plan.blocks_on(node))


def _shared(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> dict[NodeId, frozenset[int]]:
    """Blocks of a model whose sessions other deployments have on nodes already, under plans in force."""
    graphs: dict[Digest, list[int]] = {}
    found: dict[NodeId, frozenset[int]] = {}
    for name, rollout in snapshot.rollouts.items():
        current = rollout.current
        other = None if current is None or name == deployment.name else snapshot.manifests.get(current.model)
        if current is None or other is None:
            continue
        if not graphs:
            for block in manifest.blocks:
                graphs.setdefault(block.graph.digest, []).append(block.index)
        for node in current.nodes:
            held = {other.blocks[block].graph.digest for block in current.blocks_on(node)} & graphs.keys()
            if held:
                same = frozenset(index for graph in held for index in graphs[graph])
                found[NodeId(node)] = found.get(NodeId(node), frozenset()) | same
    return found


def _promised(snapshot: Snapshot) -> dict[NodeId, dict[Hosted, _Taken]]:
    """What live plans put on nodes, and what each block of it takes."""
    found: dict[NodeId, dict[Hosted, _Taken]] = {}
    for name, rollout in snapshot.rollouts.items():
        for plan in rollout.plans:
            _add(found, name, plan, snapshot)
    return found


def _add(found: dict[NodeId, dict[Hosted, _Taken]], name: DeploymentName, plan: Plan, snapshot: Snapshot) -> None:
    """Count in what a plan puts on its nodes; of two plans of a deployment, the larger caches."""
    manifest = snapshot.manifests.get(plan.model)
    if manifest is None:
        return
    sizes, caches = sizes_of(manifest), _cache_bytes(manifest, plan.settings)
    for node in plan.nodes:
        here = found.setdefault(NodeId(node), {})
        for block in plan.blocks_on(node):
            own = sizes.adapter_bytes[block] + caches[block]
            known = here.get((name, plan.model, block))
            if known is None or known.own_bytes < own:
                session = sizes.loaded_bytes[block] - sizes.adapter_bytes[block]
                here[name, plan.model, block] = _Taken(manifest.blocks[block].graph.digest, session, own)


def _sum(taken: Iterable[_Taken]) -> int:
    sessions, own = dict[Digest, int](), 0
    for one in taken:
        sessions[one.graph] = one.session_bytes
        own += one.own_bytes
    return own + sum(sessions.values())


def _missing_bytes(promised: Mapping[Hosted, _Taken], capacity: Capacity) -> int:
    """What live plans put on the node and its last heartbeat does not show as loaded."""
    if not promised:
        return 0
    loaded = {
        (stage.deployment, stage.model, block)
        for stage in capacity.stages
        if stage.state != "loading"
        for block in stage.blocks
    }
    here = {one.graph for key, one in promised.items() if key in loaded}
    missing = [one for key, one in promised.items() if key not in loaded]
    return _sum(missing) - sum({one.graph: one.session_bytes for one in missing if one.graph in here}.values())


def _cache_bytes(manifest: Manifest, settings: Settings) -> tuple[int, ...]:
    """What each block's cache takes for all slots of a deployment."""
    tokens = kv_tokens(settings)
    return tuple(tokens * size for size in sizes_of(manifest).kv_bytes_per_token)


def _plans_on(snapshot: Snapshot, node: NodeId, deployment: DeploymentName) -> Iterable[Plan]:
    rollout = snapshot.rollouts.get(deployment)
    return [plan for plan in (rollout.plans if rollout is not None else ()) if node in plan.nodes]

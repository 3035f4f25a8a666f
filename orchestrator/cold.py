"""PURE: deployments on demand: where requests for a cold one come in, and who makes room for one that is asked for.

The plan of a *cold* deployment keeps a door or two open and loads nothing. What comes there waits; the deployment is
then planned like any other and goes on with it. Where there is no room, others that are on demand make it, that first
whose memory is worth least by GreedyDual-Size (`residency.memory`; mathematics.md C3). Who runs sequences goes only
where nobody else can, and not before it has had its time: they end first, as with any plan that drains.
"""

from collections.abc import Callable, Collection, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from orchestrator.fold import Snapshot
from orchestrator.planner import Proposal, check_shape
from orchestrator.residency.memory import Memory, Rule, leaving
from orchestrator.rollout import Rollout
from orchestrator.rooms import taken_bytes
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Plan, Route

DOORS = 2
"""Nodes that take requests for a cold deployment: either may be lost."""
SETTLED = timedelta(seconds=2)
"""What was loaded for requests is not idle before they have come to it."""
BUSY = timedelta(seconds=10)
"""A deployment that runs something stays so long at least,"""
BUSY_LOADS = 2.0
"""and so many times as long as loading it took: most of the time something runs."""
UNFOUND = frozenset({ErrorCode.MODEL_TOO_LARGE, ErrorCode.INFEASIBLE})
"""Errors that more room may mend."""


@dataclass(frozen=True)
class Leaving:
    """Deployments that are to go cold, so that there is room for another."""

    names: tuple[DeploymentName, ...]


def asked_for(snapshot: Snapshot, name: DeploymentName) -> int:
    """How many of its requests wait, by the last heartbeats."""
    return sum(
        one.waiting for capacity in snapshot.present.values() for one in capacity.service if one.deployment == name
    )


def is_clearing(snapshot: Snapshot) -> bool:
    """Whether a deployment is going cold, and has its memory still."""
    return any(_is_clearing(snapshot, rollout) for rollout in snapshot.rollouts.values())


def waits_for_room(snapshot: Snapshot, name: DeploymentName) -> bool:
    """Whether a deployment that is asked for is to wait until others have gone cold, or itself: what it still holds is
    for whoever else is asked for; where nobody is, it takes that up again."""
    clearing = {other for other, rollout in snapshot.rollouts.items() if _is_clearing(snapshot, rollout)}
    return bool(clearing - {name}) or (name in clearing and _others_are_asked_for(snapshot, name))


def _others_are_asked_for(snapshot: Snapshot, name: DeploymentName) -> bool:
    return any(
        other != name and rollout.current is not None and rollout.current.cold and asked_for(snapshot, other)
        for other, rollout in snapshot.rollouts.items()
    )


def _is_clearing(snapshot: Snapshot, rollout: Rollout) -> bool:
    current, candidate = rollout.current, rollout.candidate
    if candidate is not None and candidate.plan.cold:
        return True
    if current is None or not current.cold:
        return False
    live = {plan.epoch for plan in rollout.plans} - {old.plan.epoch for old in rollout.draining}
    return any(
        stage.blocks and stage.deployment == rollout.deployment and stage.epoch not in live
        for capacity in snapshot.present.values()
        for stage in capacity.stages
    ) or any(not old.plan.cold for old in rollout.draining)


def stays_cold(deployment: Deployment, rollout: Rollout, *, wakes: bool) -> bool:
    """Whether the next plan is cold as the one in force is."""
    return deployment.on_demand and rollout.current is not None and rollout.current.cold and not wakes


def cold_plan(
    snapshot: Snapshot,
    deployment: Deployment,
    manifest: Manifest,
    reason: str,
    avoid: Collection[NodeId] = (),
) -> Proposal:
    """A cold plan. Doors are where the cloud can be asked, if there is one; they stay where requests come in now, as
    far as they may, and are else where most of the model lies. Raises `ResplitError(INFEASIBLE)` where nobody may take
    requests, and what `check_shape` raises."""
    check_shape(deployment, manifest)
    rollout, blocks = snapshot.rollout(deployment.name), len(manifest.blocks)
    before = () if rollout.current is None else tuple(route.source for route in rollout.current.routes)
    reads = 0 in deployment.sensitive_of(blocks)
    able = [node for node in snapshot.offered if node not in avoid and (not reads or snapshot.trusts(node))]
    if not able:
        who = "trusted node" if reads else "node"
        message = f"there is no {who} that could take requests for {deployment.name!r} while it is cold"
        raise ResplitError(ErrorCode.INFEASIBLE, message)

    def held(node: NodeId) -> int:
        return sum(len(one.blocks) for one in snapshot.offered[node].on_disk if one.model == deployment.model)

    outside = deployment.outside
    asks = {node for node in able if outside is not None and outside.name in snapshot.offered[node].clouds}
    doors = sorted(able, key=lambda node: (node not in asks, node not in before, -held(node), node))
    settings = deployment.settings
    doors = doors[: min(DOORS, settings.max_sequences)]
    plan = Plan(
        deployment=deployment.name,
        model=deployment.model,
        epoch=rollout.epoch + 1,
        previous=None if rollout.current is None else rollout.current.digest,
        block_count=blocks,
        settings=settings,
        routes=tuple(
            Route(
                index=index,
                source=node,
                stages=(Stage(node=node, first=0, last=blocks - 1),),
                max_sequences=settings.max_sequences // len(doors),
            )
            for index, node in enumerate(doors)
        ),
        slo=deployment.slo,
        sealed=deployment.sealed,
        cloud=outside,
        cold=True,
        loads_s=rollout.loads_s if rollout.woke_s is None else rollout.woke_s,
        reason=f"{reason}; cold, {', '.join(doors)} take(s) its requests",
    )
    return Proposal(plan, None)


def may_go_cold(snapshot: Snapshot, name: DeploymentName, now: datetime, *, while_busy: bool) -> bool:
    """Whether a deployment may go cold now; `while_busy`: even if it runs something."""
    deployment, rollout = snapshot.deployments.get(name), snapshot.rollout(name)
    if deployment is None or not deployment.on_demand or rollout.current is None or rollout.current.cold:
        return False
    if rollout.candidate is not None or rollout.draining or rollout.current_since is None:
        return False
    here = now - rollout.current_since
    if not is_busy(snapshot, name):
        return here >= SETTLED
    loads = timedelta(seconds=BUSY_LOADS * (rollout.loads_s or 0.0))
    return while_busy and here >= max(BUSY, loads)


def is_busy(snapshot: Snapshot, name: DeploymentName) -> bool:
    """Whether sequences of it run, or wait, by the last heartbeats."""
    return asked_for(snapshot, name) > 0 or any(
        stage.sequences and stage.deployment == name
        for capacity in snapshot.present.values()
        for stage in capacity.stages
    )


def without(snapshot: Snapshot, gone: Set[DeploymentName]) -> Snapshot:
    """The same once these have given their memory back."""
    before, after = taken_bytes(snapshot, snapshot.rollouts), taken_bytes(snapshot, snapshot.rollouts.keys() - gone)
    freed = {node: size - after.get(node, 0) for node, size in before.items() if size > after.get(node, 0)}
    nodes = dict(snapshot.nodes)
    for node in freed.keys() & nodes.keys():
        capacity = nodes[node].capacity
        free = min(capacity.memory_total_bytes, capacity.memory_free_bytes + freed[node])
        nodes[node] = replace(nodes[node], capacity=capacity.model_copy(update={"memory_free_bytes": free}))
    rollouts = {name: Rollout(name, one.term) if name in gone else one for name, one in snapshot.rollouts.items()}
    return replace(snapshot, nodes=nodes, rollouts=rollouts)


def room_for(
    snapshot: Snapshot,
    deployment: Deployment,
    memory: Memory[DeploymentName],
    rule: Rule,
    fits: Callable[[Snapshot], bool],
    now: datetime,
) -> Leaving | None:
    """Who is to go cold so that `deployment` has room: nobody yet, where that takes some who may not at this moment;
    None where even all together would leave too little. `rule` says who goes first, `fits` whether it could be
    planned."""

    def enough(gone: Set[DeploymentName]) -> bool:
        return fits(without(snapshot, gone))

    others = [name for name in snapshot.deployments if name != deployment.name]
    idle = [name for name in others if may_go_cold(snapshot, name, now, while_busy=False)]
    found = leaving(memory, idle, rule, enough) if idle else None
    if found is None:
        busy = [name for name in others if name not in idle and may_go_cold(snapshot, name, now, while_busy=True)]
        found = leaving(memory, [*idle, *busy], rule, enough) if busy else None
    if found is not None:
        return Leaving(found)
    return Leaving(()) if fits(all_cold(snapshot)) else None


def all_cold(snapshot: Snapshot) -> Snapshot:
    """The same, were everything cold that may ever be."""
    return without(snapshot, {name for name, one in snapshot.deployments.items() if one.on_demand})


def used(memory: Memory[DeploymentName], before: Snapshot, after: Snapshot, now_s: float) -> Memory[DeploymentName]:
    """After requests came for some: each is credited with what loading it again would take, for each of its bytes."""
    for name, arrivals in after.arrivals.items():
        if arrivals is not before.arrivals.get(name) and (size := size_bytes(after, name)):
            memory = memory.use(name, after.rollout(name).loads_s or 1.0, size, now_s)
    return memory


def size_bytes(snapshot: Snapshot, name: DeploymentName) -> int:
    """What a deployment takes of memories, over all nodes."""
    return sum(taken_bytes(snapshot, (name,)).values())

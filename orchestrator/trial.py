"""PURE: what would come of an operator's wish, tried on the snapshot before anything is stored."""

from dataclasses import replace
from datetime import datetime

from orchestrator.decide import what_is_needed
from orchestrator.fold import NodeWished, RolloutAdvanced, Snapshot, fold
from orchestrator.planner import Proposal, make_plan
from orchestrator.rollout import Candidate
from orchestrator.rooms import rooms
from profiler.cost import predict
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, NodeWish
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest


def trial(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> Proposal:
    """The plan that this deployment would get now; raises what `make_plan` raises. Nothing is changed.

    A current plan that is as wished is the answer: it has its memory already and nothing would move.
    """
    rollout, present = snapshot.rollout(deployment.name), snapshot.present
    current = rollout.current
    here = current is not None and present.keys() >= set(current.nodes)
    if current is not None and here and what_is_needed(snapshot, deployment, rollout) is None:
        return Proposal(current, predict(current.routes[0], present, manifest, deployment.model))
    for position, stage in enumerate(deployment.placement or ()):
        if stage.node in snapshot.drained:
            message = f"node {stage.node!r} is drained; run `resplit undrain {stage.node}` first or name another node"
            raise ResplitError(ErrorCode.INFEASIBLE, message, f"placement.{position}.node")
    found = rooms(snapshot, deployment, manifest)
    return make_plan(deployment, manifest, found, rollout.epoch + 1, rollout.current, "a trial")


def check_drain(snapshot: Snapshot, node: NodeId, now: datetime) -> None:
    """Whether everything on `node` can go on without it, all of it at once.

    Raises `ResplitError`: UNKNOWN_NODE for a node that nobody ever heard of; INFEASIBLE where an operator locked a
    deployment to it; what `make_plan` raises where the others have too little room, with the bytes short.
    """
    if node not in snapshot.nodes and node not in snapshot.watched:
        known = ", ".join(sorted(snapshot.nodes)) or "none"
        raise ResplitError(ErrorCode.UNKNOWN_NODE, f"there is no node {node!r}; the nodes are: {known}", "node")
    without = fold(snapshot, NodeWished(NodeWish(node=node, drained=True)), now)
    for name in users(snapshot, node):
        deployment = snapshot.deployments.get(name)
        if deployment is None:
            continue  # it was removed: it ends by itself
        try:
            proposal = _moved(without, deployment)
        except ResplitError as error:
            message = f"{name!r} cannot run without node {node!r}: {error.message}"
            raise ResplitError(error.code, message, "node") from error
        # The next deployment must find room beside this one.
        rollout = replace(without.rollout(name), candidate=Candidate(proposal.plan, now))
        without = fold(without, RolloutAdvanced(rollout), now)


def users(snapshot: Snapshot, node: NodeId) -> tuple[DeploymentName, ...]:
    """The deployments of which a live plan uses `node`, by name, ascending."""
    return tuple(sorted(name for name, rollout in snapshot.rollouts.items() if node in rollout.nodes))


def _moved(without: Snapshot, deployment: Deployment) -> Proposal:
    manifest = without.manifests.get(deployment.model)
    if manifest is None:
        message = f"the orchestrator's store does not hold its model {deployment.model}; import it there again"
        raise ResplitError(ErrorCode.UNKNOWN_MODEL, message)
    if any(stage.node in without.drained for stage in deployment.placement or ()):
        message = f"its placement is locked; run `resplit topology unlock {deployment.name}`, or place it elsewhere"
        raise ResplitError(ErrorCode.INFEASIBLE, message)
    return trial(without, deployment, manifest)

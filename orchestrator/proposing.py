"""PURE: the plan that answers a need: one that was ready, one that only changes the class, or one that is made."""

from datetime import datetime

from orchestrator.cold import cold_plan, stays_cold
from orchestrator.decide import WAKING, Cause, Need, drained_of, reclassed, standing
from orchestrator.fold import Snapshot
from orchestrator.planner import Proposal, check_routes
from orchestrator.shortlist import planned_anew
from orchestrator.weighing import failover_plan
from profiler.forecast import forecast
from profiler.host import hosts_of
from schemas.base import NodeId
from schemas.deployment import Deployment
from schemas.errors import ErrorCode, ResplitError


def ready_plan(snapshot: Snapshot, deployment: Deployment, need: Need, now: datetime) -> Proposal | None:
    """PURE: the plan of the next epoch where one was ready for this need."""
    return failover_plan(snapshot, deployment, need.reason, now) if need.cause is Cause.NODE_LOST else None


def propose(snapshot: Snapshot, deployment: Deployment, need: Need, now: datetime) -> Proposal:
    """PURE: the plan of the next epoch; raises what `make_plan` raises. Where one was ready it is that one."""
    ready = ready_plan(snapshot, deployment, need, now)
    if ready is not None:
        return ready
    manifest = snapshot.manifests.get(deployment.model)
    if manifest is None:
        message = f"the orchestrator's store does not hold model {deployment.model}; import it there again"
        raise ResplitError(ErrorCode.UNKNOWN_MODEL, message, "model")
    rollout = snapshot.rollout(deployment.name)
    if stays_cold(deployment, rollout, wakes=need.cause in WAKING):
        return cold_plan(snapshot, deployment, manifest, need.reason, rollout.shunned(now))
    same = None if rollout.current is None else reclassed(rollout.current, deployment)
    stays = same is not None and not drained_of(snapshot, same) and set(same.nodes) <= snapshot.present.keys()
    if need.cause is Cause.WISH_CHANGED and rollout.current is not None and same is not None and stays:
        # Another class of service moves nothing.
        update = {"epoch": rollout.epoch + 1, "previous": rollout.current.digest, "reason": need.reason}
        hosts = {NodeId(node): snapshot.present[NodeId(node)] for node in same.nodes}
        before = forecast(same.chains, hosts_of(hosts, manifest, same.model), manifest)
        return Proposal(same.model_copy(update=update), before)
    avoid, current = rollout.shunned(now), rollout.current
    kept = tuple(
        chain
        for chain in standing(snapshot, deployment, rollout)
        if not avoid.intersection(stage.node for stage in chain)
    )
    proposal = planned_anew(snapshot, deployment, manifest, now, need.reason, avoid, kept)
    if need.cause is Cause.MISSING_ROUTE and current is not None and len(proposal.plan.routes) <= len(current.routes):
        check_routes(deployment, proposal.plan)
    return proposal

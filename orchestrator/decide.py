"""PURE: from the whole snapshot, which deployments need something done, and why.

Level-based: every tick asks anew what is and what should be, so a report that was lost or came twice is of
no consequence. What is decided here is a value with its reason; the shell performs it.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from orchestrator.fold import Snapshot
from orchestrator.rollout import Rollout, may_propose
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment
from schemas.plan import Plan


class Cause(StrEnum):
    """What makes a new plan necessary."""

    NO_PLAN = "no_plan"
    WISH_CHANGED = "wish_changed"
    NODE_LOST = "node_lost"
    PLAN_BROKEN = "plan_broken"
    NODE_DRAINS = "node_drains"
    """The operator's word, certain and not weighed: the plan serves until its nodes are free."""
    PLAN_UNFIT = "plan_unfit"
    """It runs, and has to be left all the same: a node's memory is gone, or the SLO burns."""
    BETTER_PLAN = "better_plan"
    """Another plan saves more than moving costs (`orchestrator.trigger`)."""


HARD = frozenset({Cause.NODE_LOST, Cause.PLAN_BROKEN, Cause.PLAN_UNFIT})
"""Hard triggers (mathematics.md A4): the current plan does not serve, so nothing is weighed against acting."""


@dataclass(frozen=True)
class Need:
    """Why a deployment's current plan will not do."""

    cause: Cause
    reason: str

    @property
    def hard(self) -> bool:
        return self.cause in HARD


@dataclass(frozen=True)
class Replan:
    """Make a plan and prepare it."""

    deployment: DeploymentName
    need: Need


@dataclass(frozen=True)
class DropCandidate:
    """Stop preparing a plan that is no longer what is wanted."""

    deployment: DeploymentName
    reason: str


@dataclass(frozen=True)
class End:
    """The deployment was removed: drain it."""

    deployment: DeploymentName
    reason: str


Decision = Replan | DropCandidate | End


def decide(snapshot: Snapshot, now: datetime) -> tuple[Decision, ...]:
    """At most one decision per deployment, in the order of their names."""
    names = sorted({*snapshot.deployments, *snapshot.rollouts})
    return tuple(found for name in names if (found := _decide_one(snapshot, name, now)) is not None)


def _decide_one(snapshot: Snapshot, name: DeploymentName, now: datetime) -> Decision | None:
    deployment, rollout = snapshot.deployments.get(name), snapshot.rollout(name)
    if deployment is None:
        live = rollout.current is not None or rollout.candidate is not None
        return End(name, "the deployment was removed") if live else None
    if rollout.candidate is not None:
        if not conforms(rollout.candidate.plan, deployment):
            return DropCandidate(name, "the deployment was changed while this plan was prepared")
        if leaving := drained_of(snapshot, rollout.candidate.plan):
            return DropCandidate(name, f"to be drained: {', '.join(leaving)}")
        return None
    need = what_is_needed(snapshot, deployment, rollout)
    if need is None or not may_propose(rollout, need.hard):
        return None
    if rollout.retry_at is not None and now < rollout.retry_at:
        return None
    return Replan(name, need)


def what_is_needed(snapshot: Snapshot, deployment: Deployment, rollout: Rollout) -> Need | None:
    """Why the current plan will not do, or None while it will."""
    current = rollout.current
    if current is None:
        return Need(Cause.NO_PLAN, "the deployment has no plan yet")
    lost = sorted(snapshot.absent.intersection(current.nodes))
    if lost:
        return Need(Cause.NODE_LOST, f"lost: {', '.join(lost)}")
    if rollout.current_faults:
        faults = "; ".join(f"{node}: {why}" for node, why in sorted(rollout.current_faults.items()))
        return Need(Cause.PLAN_BROKEN, f"the plan does not run any more ({faults})")
    if not conforms(current, deployment):
        return Need(Cause.WISH_CHANGED, "the deployment was changed")
    if leaving := drained_of(snapshot, current):
        return Need(Cause.NODE_DRAINS, f"to be drained: {', '.join(leaving)}")
    return None


def drained_of(snapshot: Snapshot, plan: Plan) -> list[NodeId]:
    """The nodes of a plan that are to be drained. It serves meanwhile: nothing breaks, but it must move (a soft
    trigger that no cost of moving outweighs)."""
    return sorted(snapshot.drained.intersection(plan.nodes))


def conforms(plan: Plan, deployment: Deployment) -> bool:
    """Whether the plan is one that the deployment asks for; whether a better one exists is another question."""
    if (plan.model, plan.settings, plan.slo) != (deployment.model, deployment.settings, deployment.slo):
        return False
    stages = plan.routes[0].stages
    if deployment.placement is not None:
        return stages == deployment.placement
    return deployment.stages is None or len(stages) == deployment.stages


def reclassed(plan: Plan, deployment: Deployment) -> Plan | None:
    """The same plan with the deployment's class, where nothing else about the deployment has changed."""
    found = plan.model_copy(update={"slo": deployment.slo})
    return found if found != plan and conforms(found, deployment) else None

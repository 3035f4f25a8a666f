"""PURE: from the whole snapshot, which deployments need something done, and why.

Level-based: every tick asks anew what is and what should be, so a report that was lost or came twice is of
no consequence. What is decided here is a value with its reason; the shell performs it.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from orchestrator.cold import asked_for, waits_for_room
from orchestrator.fold import Snapshot
from orchestrator.rollout import Rollout, may_propose
from orchestrator.trust import exposed
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, Placement
from schemas.plan import Plan


class Cause(StrEnum):
    """What makes a new plan necessary."""

    NO_PLAN = "no_plan"
    WISH_CHANGED = "wish_changed"
    NODE_LOST = "node_lost"
    PLAN_BROKEN = "plan_broken"
    TRUST_CHANGED = "trust_changed"
    """A sensitive block is on a node that is not trusted (any more)."""
    MODEL_BARRED = "model_barred"
    """The root's policy does not let the deployment run its model (any more)."""
    ASKED_FOR = "asked_for"
    """It is cold, and requests wait."""
    EXPECTED = "expected"
    """It is cold, and worth loading ahead of need."""
    MAKES_ROOM = "makes_room"
    """It is to go cold, for the sake of another that is asked for; nobody decides that here."""
    MISSING_ROUTE = "missing_route"
    """Fewer routes serve than are asked for. They serve, so they are weighed meanwhile."""
    NODE_DRAINS = "node_drains"
    """The operator's word, certain and not weighed: the plan serves until its nodes are free."""
    PLAN_UNFIT = "plan_unfit"
    """It runs, and has to be left all the same: a node's memory is gone, or the SLO burns."""
    BETTER_PLAN = "better_plan"
    """Another plan saves more than moving costs (`orchestrator.trigger`)."""


HARD = frozenset(
    {
        Cause.NODE_LOST,
        Cause.PLAN_BROKEN,
        Cause.PLAN_UNFIT,
        Cause.TRUST_CHANGED,
        Cause.MODEL_BARRED,
        Cause.ASKED_FOR,
    }
)
"""Hard triggers (mathematics.md A4): the current plan does not serve, so nothing is weighed against acting."""


WAKING = frozenset({Cause.ASKED_FOR, Cause.EXPECTED})
"""What has a cold deployment loaded."""


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
        if _may_be_a_service(snapshot, name):
            return None
        live = rollout.current is not None or rollout.candidate is not None
        return End(name, "the deployment was removed") if live else None
    if rollout.candidate is not None:
        if not conforms(rollout.candidate.plan, deployment):
            return DropCandidate(name, "the deployment was changed while this plan was prepared")
        if deployment.is_barred:
            return DropCandidate(name, f"the root's policy does not let it run model {deployment.model[:12]}")
        if exposed := exposed_by(snapshot, deployment, rollout.candidate.plan):
            return DropCandidate(name, exposed)
        if leaving := drained_of(snapshot, rollout.candidate.plan):
            return DropCandidate(name, f"to be drained: {', '.join(leaving)}")
        return None
    need = what_is_needed(snapshot, deployment, rollout)
    if need is None or not may_propose(rollout, need.hard) or _awaits(snapshot, deployment, rollout, need):
        return None
    if rollout.retry_at is not None and now < rollout.retry_at:
        return None
    return Replan(name, need)


def _may_be_a_service(snapshot: Snapshot, name: DeploymentName) -> bool:
    """Whether it could be of a pipeline that is not known in full: the store does not have a manifest, say."""
    return any(
        name.startswith(f"{of}-") and not _is_known(snapshot, deployment)
        for of, deployment in snapshot.deployments.items()
    )


def _is_known(snapshot: Snapshot, deployment: Deployment) -> bool:
    manifest = snapshot.manifests.get(deployment.model)
    services = () if manifest is None or manifest.pipeline is None else manifest.pipeline.services.values()
    return manifest is not None and all(service.model in snapshot.manifests for service in services)


def what_is_needed(snapshot: Snapshot, deployment: Deployment, rollout: Rollout) -> Need | None:
    """Why the current plan will not do, or None while it will."""
    current = rollout.current
    if current is None:
        return Need(Cause.NO_PLAN, "the deployment has no plan yet")
    if deployment.is_barred:
        return Need(Cause.MODEL_BARRED, f"the root's policy does not let it run model {deployment.model[:12]}")
    lost = sorted(snapshot.absent.intersection(current.nodes))
    if lost:
        return Need(Cause.NODE_LOST, f"lost: {', '.join(lost)}")
    if rollout.current_faults:
        faults = "; ".join(f"{node}: {why}" for node, why in sorted(rollout.current_faults.items()))
        return Need(Cause.PLAN_BROKEN, f"the plan does not run any more ({faults})")
    if exposed := exposed_by(snapshot, deployment, current):
        return Need(Cause.TRUST_CHANGED, exposed)
    if not conforms(current, deployment):
        return Need(Cause.WISH_CHANGED, "the deployment was changed")
    if leaving := drained_of(snapshot, current):
        return Need(Cause.NODE_DRAINS, f"to be drained: {', '.join(leaving)}")
    if current.cold and not deployment.on_demand:
        return Need(Cause.NO_PLAN, "there was no room for it, and its cloud answers meanwhile")
    if current.cold:
        waiting = asked_for(snapshot, deployment.name)
        return Need(Cause.ASKED_FOR, f"{waiting} request(s) wait for it") if waiting else None
    if deployment.routes is not None and len(current.routes) < deployment.routes:
        return Need(Cause.MISSING_ROUTE, f"{deployment.routes} routes are asked for and {len(current.routes)} serve(s)")
    return None


def _awaits(snapshot: Snapshot, deployment: Deployment, rollout: Rollout, need: Need) -> bool:
    """Whether only the class is new and some node of the plan was not heard yet: after a cold start each soon is, or it
    is lost, and until then nobody knows that anything has to move. Or whether others are about to make room."""
    current = rollout.current
    if need.cause is Cause.ASKED_FOR and waits_for_room(snapshot, deployment.name):
        return True
    return (
        need.cause is Cause.WISH_CHANGED
        and current is not None
        and reclassed(current, deployment) is not None
        and not set(current.nodes) <= snapshot.present.keys()
    )


def serves(need: Need | None) -> bool:
    """Whether the plan serves well enough to be weighed against others."""
    return need is None or need.cause is Cause.MISSING_ROUTE


def standing(snapshot: Snapshot, deployment: Deployment, rollout: Rollout) -> Placement:
    """The routes of the current plan that can stay as they are, whatever is to become of the others."""
    current = rollout.current
    if current is None or current.model != deployment.model or current.settings != deployment.settings:
        return ()
    if current.cold or deployment.chains is not None:
        return ()
    secret = deployment.sensitive_of(current.block_count)
    usable = snapshot.offered.keys() - rollout.current_faults.keys()
    return tuple(
        chain
        for chain in current.chains
        if (deployment.stages is None or len(chain) == deployment.stages)
        and all(stage.node in usable for stage in chain)
        and not any(exposed(secret, stage.blocks, snapshot.trusts(stage.node)) for stage in chain)
    )


def exposed_by(snapshot: Snapshot, deployment: Deployment, plan: Plan) -> str | None:
    """Which sensitive block a plan puts on which node that is not trusted (I6); None where it puts none.

    A plan in force was allowed when it was made: after a cold start a node that was not heard yet says nothing new."""
    secret = deployment.sensitive_of(plan.block_count)
    for node in plan.nodes if secret else ():
        # The doors of a cold plan read what the first block would.
        held = (0,) if plan.cold else plan.blocks_on(node)
        blocks = exposed(secret, held, not snapshot.distrusts(NodeId(node)))
        if blocks:
            return f"block {blocks[0]} is sensitive and node {node}, which holds it, is not trusted"
    return None


def drained_of(snapshot: Snapshot, plan: Plan) -> list[NodeId]:
    """The nodes of a plan that are to be drained. It serves meanwhile: nothing breaks, but it must move (a soft
    trigger that no cost of moving outweighs)."""
    return sorted(snapshot.drained.intersection(plan.nodes))


def conforms(plan: Plan, deployment: Deployment) -> bool:
    """Whether the plan is one that the deployment asks for; whether a better one exists, or
    another route is missing, is another question."""
    asked = (deployment.model, deployment.settings, deployment.slo, deployment.sealed, deployment.outside)
    if (plan.model, plan.settings, plan.slo, plan.sealed, plan.cloud) != asked:
        return False
    if plan.cold:
        return deployment.on_demand or deployment.cloud is not None
    if deployment.chains is not None:
        return plan.chains == deployment.chains
    if deployment.routes is not None and len(plan.routes) > deployment.routes:
        return False
    return deployment.stages is None or all(len(chain) == deployment.stages for chain in plan.chains)


def reclassed(plan: Plan, deployment: Deployment) -> Plan | None:
    """The same plan with the deployment's class, whether requests are to be sealed, and its cloud, where nothing else
    about the deployment has changed."""
    update = {"slo": deployment.slo, "sealed": deployment.sealed, "cloud": deployment.outside}
    found = plan.model_copy(update=update)
    return found if found != plan and conforms(found, deployment) else None

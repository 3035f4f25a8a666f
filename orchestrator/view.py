"""PURE: the snapshot in the words of an operator's `status`."""

from datetime import datetime
from typing import Literal

from orchestrator.decide import Need, what_is_needed
from orchestrator.fold import Snapshot
from orchestrator.pipelines import pipelines
from orchestrator.rollout import Rollout
from profiler.forecast import forecast
from profiler.host import hosts_of
from schemas.base import DeploymentName, NodeId
from schemas.control import Attainment, CloudStatus, DeploymentStatus, NodeStatus, StatusReply
from schemas.deployment import Deployment
from schemas.pipeline import service_deployment
from schemas.plan import Plan

State = Literal["waiting", "preparing", "cold", "serving", "changing", "degraded", "draining"]


def status(snapshot: Snapshot, now: datetime) -> StatusReply:
    """Everything there is to know, by name, ascending. Who left the cluster is there while a plan still needs it."""
    nodes = tuple(
        NodeStatus(
            capacity=node.capacity,
            age_s=round((now - node.heard_at).total_seconds(), 3),
            lost=name in snapshot.absent,
            trusted=snapshot.trusts(name),
        )
        for name, node in sorted(snapshot.nodes.items())
        if snapshot.belongs(name) or name in snapshot.watched
    )
    names = sorted({*snapshot.deployments, *(name for name, one in snapshot.rollouts.items() if one.plans)})
    return StatusReply(
        term=snapshot.term,
        nodes=nodes,
        deployments=tuple(_deployment(snapshot, name, now) for name in names),
        drained=tuple(sorted(snapshot.drained)),
    )


def estimate(snapshot: Snapshot, plan: Plan | None) -> dict[str, float] | None:
    """What the plan is predicted to cost now, or None while something about it is unknown, where nothing is loaded, and
    of a pipeline, whose own plan says who conducts it: what it takes is up to its services."""
    manifest = snapshot.manifests.get(plan.model) if plan is not None else None
    if plan is None or plan.cold or manifest is None or manifest.pipeline is not None:
        return None
    if not all(NodeId(node) in snapshot.nodes for node in plan.nodes):
        return None
    capacities = {NodeId(node): snapshot.nodes[NodeId(node)].capacity for node in plan.nodes}
    hosts = hosts_of(capacities, manifest, plan.model)
    return forecast(plan.chains, hosts, manifest, settings=plan.settings).terms


def _deployment(snapshot: Snapshot, name: DeploymentName, now: datetime) -> DeploymentStatus:
    deployment, rollout = snapshot.deployments.get(name), snapshot.rollout(name)
    errors = snapshot.errors.get(name)
    need = None if deployment is None else what_is_needed(snapshot, deployment, rollout)
    model = deployment.model if deployment is not None else next((plan.model for plan in rollout.plans), None)
    manifest = snapshot.manifests.get(model) if model is not None else None
    unplaced = snapshot.pipelines[name].error if name in snapshot.pipelines else None
    waits_for = _waits_for(snapshot, name) if deployment is not None else None
    return DeploymentStatus(
        name=name,
        state=_state(rollout, need, removed=deployment is None) if waits_for is None else "preparing",
        deployment=deployment,
        model_name=manifest.name if manifest is not None else None,
        current=rollout.current,
        candidate=rollout.candidate.plan if rollout.candidate is not None else None,
        draining=tuple(old.plan for old in rollout.draining),
        ready=tuple(sorted(rollout.candidate.ready)) if rollout.candidate is not None else (),
        applied=tuple(sorted(rollout.applied)),
        cloud=None if deployment is None else _cloud(snapshot, deployment),
        estimate=estimate(snapshot, rollout.current),
        attainment=_attainment(snapshot, rollout, now),
        prediction=errors.sentence if errors is not None else None,
        prediction_error=errors.terms if errors is not None else None,
        reason=need.reason if need is not None else waits_for,
        error=rollout.last_error if need is not None else unplaced,
        revision=rollout.revision,
    )


def _cloud(snapshot: Snapshot, deployment: Deployment) -> CloudStatus | None:
    if deployment.outside is None:
        return None
    able = tuple(sorted(name for name, one in snapshot.present.items() if deployment.outside.name in one.clouds))
    counts = [
        one.cloud
        for capacity in snapshot.present.values()
        for one in capacity.service
        if one.deployment == deployment.name and one.cloud is not None
    ]
    answered = sum(one.answered for one in counts)
    mean_ms = round(sum(one.total_ms for one in counts) / answered, 3) if answered else None
    cost = sum(one.cost for one in counts)
    return CloudStatus(
        nodes=able, asked=sum(one.asked for one in counts), answered=answered, mean_ms=mean_ms, cost=cost
    )


def _waits_for(snapshot: Snapshot, name: DeploymentName) -> str | None:
    """What a pipeline waits for before requests can pass all of its services."""
    pipeline = pipelines(snapshot).get(name)
    for service in () if pipeline is None else pipeline.services:
        if snapshot.rollout(service_deployment(name, service)).current is None:
            return f"no plan of service {service} is in force yet"
    return None


def _attainment(snapshot: Snapshot, rollout: Rollout, now: datetime) -> Attainment | None:
    if rollout.current is None or rollout.current.slo is None:
        return None
    return snapshot.attainment(rollout.deployment, now)


def _state(rollout: Rollout, need: Need | None, removed: bool) -> State:
    if removed:
        return "draining"
    if rollout.current is None:
        return "waiting" if rollout.candidate is None else "preparing"
    if rollout.current.cold:
        return "cold" if rollout.candidate is None or rollout.candidate.plan.cold else "preparing"
    if need is not None and need.hard:
        return "degraded"
    moving = rollout.candidate is not None or rollout.draining
    return "changing" if moving or need is not None else "serving"

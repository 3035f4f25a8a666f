"""PURE: decisions in the words of an operator's `explain` and `plan --dry-run`, and as the audit trail has them."""

from datetime import datetime

from orchestrator.decision import Decision, Option
from orchestrator.fold import Snapshot
from orchestrator.pipelines import by_service, pipelines
from orchestrator.services.cluster import SLOT_MS
from orchestrator.services.standing import Standing
from orchestrator.trigger import Policy
from orchestrator.weighing import subject, weigh
from profiler.error import PredictionError
from schemas.base import DeploymentName, NodeId
from schemas.control import CandidateReport, DecisionReport, ExplainReply, PipelineReport, PlanReply, TaskReport
from schemas.deployment import nodes_of
from schemas.errors import ErrorCode, ResplitError
from schemas.pipeline import service_deployment
from schemas.plan import Plan

RUNNERS_UP_AUDITED = 6
"""The others can be had from the orchestrator while the decision is its last; an audit event stays small."""


def explained(snapshot: Snapshot, name: DeploymentName | None, policy: Policy, now: datetime) -> ExplainReply:
    """The last decision about the plan in force, made now where there is none yet; without a name of every deployment
    that has a plan. Raises `ResplitError` for a name that is unknown or has none."""
    names = [name] if name is not None else [n for n in sorted(snapshot.deployments) if _has_plan(snapshot, n)]
    found, of_pipelines = [], dict[DeploymentName, PipelineReport]()
    for one in names:
        if (pipeline := _pipeline_of(snapshot, one)) is not None:
            of_pipelines[pipeline] = pipeline_report(snapshot, pipeline)
            continue
        _, _, current = subject(snapshot, one)
        kept = snapshot.outlooks.get(one)
        leaving = (snapshot.absent | snapshot.drained) & snapshot.rollout(one).nodes
        about_it = kept is not None and kept.plan == current.digest and not leaving
        outlook = kept if kept is not None and about_it else weigh(snapshot, one, policy, now)
        found.append(report(current, outlook.decision, snapshot.errors.get(one)))
    return ExplainReply(decisions=tuple(found), pipelines=tuple(of_pipelines.values()))


def dry_run(snapshot: Snapshot, name: DeploymentName, policy: Policy, now: datetime) -> PlanReply:
    """What would be decided now; raises `ResplitError` for a deployment that is unknown or has no plan."""
    if (pipeline := _pipeline_of(snapshot, name)) is not None:
        message = f"{name!r} is not weighed: services are placed with their pipeline; see `resplit explain {pipeline}`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
    _, _, current = subject(snapshot, name)
    decision = weigh(snapshot, name, policy, now, afresh=True).decision
    return PlanReply(decision=report(current, decision, snapshot.errors.get(name)))


def pipeline_report(snapshot: Snapshot, name: DeploymentName) -> PipelineReport:
    """Where the services of a pipeline are, and why."""
    pipeline, standing = pipelines(snapshot)[name], snapshot.pipelines[name]
    per_s = {task: rate * 1e3 / SLOT_MS for task, rate in standing.rates.tasks.items()}
    return PipelineReport(
        pipeline=name,
        sentence=standing.why or "nothing was placed yet",
        at=standing.changed_at,
        services={service: _nodes_of(snapshot, name, service) for service in pipeline.services},
        tasks={
            task: TaskReport(
                per_s=round(per_s.get(task, 0.0), 4),
                late=None if task not in standing.late else round(standing.late[task], 6),
                owed=round(standing.debts.get(task, 0.0), 4),
            )
            for task in pipeline.tasks
        },
        strain=round(standing.strain, 4),
        terms=dict(standing.terms),
        error=standing.error,
    )


def _pipeline_of(snapshot: Snapshot, name: DeploymentName) -> DeploymentName | None:
    """The pipeline that a deployment is, or with whose services it is placed; None for any other, and one that is cut
    is weighed like any."""
    deployment = snapshot.deployments.get(name)
    if deployment is None:
        return None
    of = deployment.service_of
    found = name if of is None else of.pipeline if deployment.chains is not None else None
    return found if found in snapshot.pipelines and found in pipelines(snapshot) else None


def _nodes_of(snapshot: Snapshot, name: DeploymentName, service: str) -> tuple[NodeId, ...]:
    current = snapshot.rollout(service_deployment(name, service)).current
    return () if current is None else nodes_of(current.chains)


def report(current: Plan, decision: Decision, errors: PredictionError | None = None) -> DecisionReport:
    """A decision about `current` as it travels, with how far predictions were off."""
    whys = {one.option.key: one for one in decision.runners_up}
    ordered = {one.key: one for one in (decision.current, decision.chosen, *(r.option for r in decision.runners_up))}
    moves = {key: one.move for key, one in whys.items()}
    moves[decision.chosen.key] = decision.move

    def row(option: Option) -> CandidateReport:
        why, move = whys.get(option.key), moves.get(option.key)
        return CandidateReport(
            routes=option.chains,
            origin=option.origin.value,
            without=option.without,
            phi=round(option.phi, 4),
            terms={**option.terms, **option.objective.terms},
            move=None if move is None else move.terms,
            why_not=None if why is None else why.why_not,
        )

    return DecisionReport(
        deployment=current.deployment,
        epoch=decision.epoch,
        plan_reason=current.reason,
        at=decision.at,
        action=decision.action.value,
        sentence=decision.sentence,
        certified=decision.certified,
        bound=round(decision.bound, 4),
        candidates=tuple(map(row, ordered.values())),
        prediction=None if errors is None else errors.sentence,
    )


def audited(decision: Decision) -> dict[str, str | int | float | bool | None]:
    """What an audit event says of a decision; short texts, since a field holds 500 characters."""
    others = {
        f"not_{position}": f"{one.option.key} ({one.option.origin}, Phi {one.option.phi:.3f}): {one.why_not}"
        for position, one in enumerate(decision.runners_up[:RUNNERS_UP_AUDITED])
    }
    return {
        "action": decision.action.value,
        "reason": decision.sentence,
        "chosen": decision.chosen.key,
        "certified": decision.certified,
        "bound": round(decision.bound, 4),
        **{f"{name}_before": value for name, value in decision.current.objective.terms.items()},
        **{f"{name}_after": value for name, value in decision.chosen.objective.terms.items()},
        **(decision.move.terms if decision.move is not None else {}),
        **others,
    }


def audited_services(standing: Standing) -> dict[str, str | int | float | bool | None]:
    """What an audit event says of the services of a pipeline: where each is, why, and the figures of it."""
    where = {f"at_{service}": ", ".join(nodes) for service, nodes in by_service(standing.placed).items()}
    return {"reason": standing.why, **where, **standing.terms}


def _has_plan(snapshot: Snapshot, name: DeploymentName) -> bool:
    current = snapshot.rollout(name).current
    return current is not None and not current.cold and current.model == snapshot.deployments[name].model

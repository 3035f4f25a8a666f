"""PURE: decisions in the words of an operator's `explain` and `plan --dry-run`, and as the audit trail has them."""

from datetime import datetime

from orchestrator.decision import Decision, Option
from orchestrator.fold import Snapshot
from orchestrator.trigger import Policy
from orchestrator.weighing import subject, weigh
from profiler.error import PredictionError
from schemas.base import DeploymentName
from schemas.control import CandidateReport, DecisionReport, ExplainReply, PlanReply
from schemas.plan import Plan

RUNNERS_UP_AUDITED = 6
"""The others can be had from the orchestrator while the decision is its last; an audit event stays small."""


def explained(snapshot: Snapshot, name: DeploymentName | None, policy: Policy, now: datetime) -> ExplainReply:
    """The last decision about the plan in force, made now where there is none yet; without a name of every deployment
    that has a plan. Raises `ResplitError` for a name that is unknown or has none."""
    names = [name] if name is not None else [n for n in sorted(snapshot.deployments) if _has_plan(snapshot, n)]
    found = []
    for one in names:
        _, _, current = subject(snapshot, one)
        kept = snapshot.outlooks.get(one)
        leaving = (snapshot.absent | snapshot.drained) & snapshot.rollout(one).nodes
        about_it = kept is not None and kept.plan == current.digest and not leaving
        outlook = kept if kept is not None and about_it else weigh(snapshot, one, policy, now)
        found.append(report(current, outlook.decision, snapshot.errors.get(one)))
    return ExplainReply(decisions=tuple(found))


def dry_run(snapshot: Snapshot, name: DeploymentName, policy: Policy, now: datetime) -> PlanReply:
    """What would be decided now; raises `ResplitError` for a deployment that is unknown or has no plan."""
    _, _, current = subject(snapshot, name)
    decision = weigh(snapshot, name, policy, now, afresh=True).decision
    return PlanReply(decision=report(current, decision, snapshot.errors.get(name)))


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


def _has_plan(snapshot: Snapshot, name: DeploymentName) -> bool:
    current = snapshot.rollout(name).current
    return current is not None and current.model == snapshot.deployments[name].model

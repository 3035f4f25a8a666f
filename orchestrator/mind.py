"""PURE, but for its memory: what a leader does, one step after another, and what each of them waits for.

A step that needs the world is yielded, and goes on once that is done: an event is in the log before it holds here, and
solving may take seconds. Who drives it performs what is yielded: `orchestrator.core` on the bus, the simulator in its
own time.
"""

import json
from collections.abc import Callable, Generator, Mapping
from datetime import datetime
from typing import Protocol, assert_never

from bus.audit import Trail
from orchestrator.caretaker import Caretaker
from orchestrator.cold import UNFOUND
from orchestrator.decide import (
    Cause,
    Decision,
    DropCandidate,
    End,
    Need,
    Replan,
    decide,
    serves,
    what_is_needed,
)
from orchestrator.decision import Action
from orchestrator.explaining import audited
from orchestrator.fold import (
    CapacityReceived,
    Report,
    RolloutAdvanced,
    Snapshot,
    Weighed,
    fold,
)
from orchestrator.outlook import Outlook
from orchestrator.planner import Proposal
from orchestrator.proposing import propose, ready_plan
from orchestrator.residency.memory import Keeping
from orchestrator.residents import Residents
from orchestrator.rollout import Abandon, Command, Proceed, Propose, Rollout, Withdraw, failed, may_propose, step
from orchestrator.steps import Append, Effect, Solve, Solved, Steps
from orchestrator.view import estimate
from orchestrator.weighing import chosen_plan
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment
from schemas.errors import ResplitError
from schemas.plan import PlanEvent, PlanPhase

TOLD_EVERY = 32
"""Finished requests of a deployment between two words in the audit trail of how far predictions were off."""

AUDIT_KINDS = {
    PlanPhase.PREPARE: (AuditKind.PLAN_PREPARED, "a plan is to be prepared"),
    PlanPhase.COMMIT: (AuditKind.PLAN_COMMITTED, "a plan is in force"),
    PlanPhase.ABORT: (AuditKind.PLAN_ABORTED, "a plan was given up before it was in force"),
    PlanPhase.RETIRE: (AuditKind.PLAN_RETIRED, "a plan ends"),
    PlanPhase.RESEAL: (AuditKind.PLAN_RESEALED, "plans were sealed anew"),
}


class Weighs(Protocol):
    """Weighs plans beside everything else; `orchestrator.scales.Scales`."""

    def put(self, snapshot: Snapshot, now: datetime, /) -> None: ...
    def take(self) -> Outlook | None: ...


class Mind:
    """What a leader knows, and what it does about it."""

    def __init__(
        self, snapshot: Snapshot, audit: Trail, now: Callable[[], datetime], keeping: Keeping = "worth"
    ) -> None:
        self.snapshot = snapshot
        self.audit = audit
        self.now = now
        self._services = Caretaker(self)
        self._residents = Residents(self, keeping)

    def begin(self) -> Steps:
        """Give up what the leader before had begun to prepare: nobody knows who was ready (mathematics.md A5)."""
        for name, rollout in self.snapshot.rollouts.items():
            if rollout.candidate is not None:
                yield from self.take(name, Abandon("the leader changed before the plan was in force"))

    def settle(self, scales: Weighs) -> Steps:
        """Perform what the snapshot asks for, act on what was weighed, and take every step that can be taken."""
        yield from self._services.look_after()
        yield from self._residents.look_after()
        for decision in decide(self.snapshot, self.now()):
            yield from self._perform(decision)
        outlook = scales.take()
        if outlook is not None:
            yield from self._weighed(outlook)
        scales.put(self.snapshot, self.now())
        for name in sorted(self.snapshot.rollouts):
            while (yield from self.take(name, Proceed())):
                pass

    def _perform(self, decision: Decision) -> Steps:
        match decision:
            case Replan(name, need):
                yield from self.replan(self.snapshot.deployments[name], need)
            case DropCandidate(name, reason):
                yield from self.take(name, Abandon(reason))
            case End(name, reason):
                yield from self.take(name, Withdraw(reason))
            case _:
                assert_never(decision)

    def replan(self, deployment: Deployment, need: Need) -> Steps:
        before = estimate(self.snapshot, self.snapshot.rollout(deployment.name).current)
        try:
            # Solving may take seconds, and heartbeats must be heard meanwhile. The snapshot is a frozen value. What was
            # ready is only checked, which takes no longer than to wait for a thread while plans are weighed in another.
            proposal = ready_plan(self.snapshot, deployment, need, self.now())
            if proposal is None:
                snapshot, now = self.snapshot, self.now()
                solved = yield Solve(lambda: propose(snapshot, deployment, need, now))
                assert isinstance(solved, Proposal), "whoever performs a `Solve` sends its answer, or throws its error"
                proposal = solved
        except ResplitError as error:
            if not (error.code in UNFOUND and (yield from self._residents.make_room(deployment, need))):
                self._give_up(deployment.name, need, error)
            return
        terms = {**proposal.terms, **{f"{name}_before": value for name, value in (before or {}).items()}}
        yield from self.take(deployment.name, Propose(proposal.plan, need.hard), need.cause.value, terms)

    def _weighed(self, outlook: Outlook) -> Steps:
        """Keep what was found, and act on it if it is still about the plan in force."""
        name, decision = outlook.deployment, outlook.decision
        deployment, rollout = self.snapshot.deployments.get(name), self.snapshot.rollout(name)
        if deployment is None or rollout.current is None or rollout.current.digest != outlook.plan:
            return
        before = self.snapshot.outlooks.get(name)
        self.fold(Weighed(outlook), self.now())
        last = None if before is None else (before.decision.epoch, before.decision.action)
        if decision.acts or last != (decision.epoch, decision.action):
            self.audit.record(
                AuditKind.DECISION,
                "a plan was weighed",
                deployment=name,
                epoch=decision.epoch,
                request=None,
                then=None,
                **audited(decision),
            )
        if outlook.regret is not None and rollout.candidate is not None:
            epoch, why = outlook.regret
            if rollout.candidate.plan.epoch == epoch:
                yield from self.take(name, Abandon(why))
            return
        hard = decision.action is Action.HARD
        needed = what_is_needed(self.snapshot, deployment, rollout)
        if not decision.acts or not serves(needed) or not may_propose(rollout, hard):
            return
        if not decision.chosen.nodes <= self.snapshot.offered.keys():
            return  # a node of it was lost or is to be drained since: it is weighed anew without it
        need = Need(Cause.PLAN_UNFIT if hard else Cause.BETTER_PLAN, decision.sentence)
        try:
            proposal = chosen_plan(self.snapshot, outlook)
        except ResplitError as error:
            self._give_up(name, need, error)
            return
        before_terms = {f"{term}_before": value for term, value in decision.current.terms.items()}
        terms = {**decision.chosen.terms, **decision.chosen.objective.terms, **before_terms}
        yield from self.take(name, Propose(proposal.plan, hard), need.cause.value, terms)

    def _give_up(self, name: DeploymentName, need: Need, error: ResplitError) -> None:
        rollout = self.snapshot.rollout(name)
        if rollout.last_error != error.body:  # said once, however often it is tried
            self.audit.record(
                AuditKind.DEPLOYMENT_INFEASIBLE,
                "no plan can be made",
                deployment=name,
                code=error.code.value,
                why=error.message,
                cause=need.cause.value,
                reason=need.reason,
            )
        self.fold(RolloutAdvanced(failed(rollout, error.body, self.now())), self.now())

    def take(
        self, name: DeploymentName, command: Command, cause: str | None = None, terms: Mapping[str, float] | None = None
    ) -> Generator[Effect, Solved, bool]:
        """Take one step of a rollout, if there is one to take: logged first, then in force here, then audited."""
        before = self.snapshot.rollout(name)
        roster = self.snapshot.roster
        taken = step(before, command, self.now(), self.snapshot.absent, 0 if roster is None else roster.version)
        if taken is None:
            return False
        after, event = taken
        yield Append(event)
        self.fold(RolloutAdvanced(after), self.now())
        kind, message = AUDIT_KINDS[event.phase]
        self.audit.record(
            kind,
            message,
            deployment=name,
            epoch=_epoch(event, before),
            reason=event.reason,
            revision=event.revision,
            placement=_placement(event),
            cause=cause,
            terms=json.dumps(terms) if terms else None,
        )
        return True

    def fold(self, report: Report, at: datetime) -> None:
        """Take in what was heard at `at`."""
        before, self.snapshot = self.snapshot, fold(self.snapshot, report, at)
        after = self.snapshot
        self._residents.note(before, after, at)
        self._tell_errors(before, after)
        if before.absent is not after.absent:
            for name in sorted(after.absent - before.absent):
                self.audit.record(AuditKind.NODE_LOST, "a node is silent", node=name)
        if isinstance(report, CapacityReceived):
            self._tell_joined(before, after, report.capacity.node)

    def _tell_joined(self, before: Snapshot, after: Snapshot, name: NodeId) -> None:
        """A node reports that was not known, or was lost, or is another process now."""
        known, node = before.nodes.get(name), after.nodes.get(name)
        returns = name in before.absent and name not in after.absent
        if node is None or (known is not None and not returns and known.capacity.boot == node.capacity.boot):
            return
        self.audit.record(
            AuditKind.NODE_JOINED,
            "a node reports",
            node=name,
            boot=node.capacity.boot,
            version=node.capacity.version,
            provider=node.capacity.provider.name,
            memory_free_bytes=node.capacity.memory_free_bytes,
        )

    def _tell_errors(self, before: Snapshot, after: Snapshot) -> None:
        if before.errors is after.errors:
            return
        for name, errors in after.errors.items():
            known = before.errors.get(name)
            if known is None or errors.requests // TOLD_EVERY > known.requests // TOLD_EVERY:
                self.audit.record(
                    AuditKind.PREDICTION_JUDGED,
                    "what requests met was held against its prediction",
                    deployment=name,
                    epoch=None,
                    request=None,
                    then=None,
                    requests=errors.requests,
                    said=errors.sentence,
                    **errors.terms,
                )


def _epoch(event: PlanEvent, before: Rollout) -> int | None:
    """The epoch that an event is about."""
    if event.candidate is not None:
        return event.candidate.epoch
    if event.phase in (PlanPhase.COMMIT, PlanPhase.RESEAL) and event.current is not None:
        return event.current.epoch
    gone = {plan.epoch for plan in before.plans} - {plan.epoch for plan in event.plans}
    return max(gone, default=event.draining[-1].epoch if event.draining else None)


def _placement(event: PlanEvent) -> str | None:
    plan = event.candidate or event.current
    if plan is None:
        return None
    chains = [" ".join(f"{stage.node}[{stage.first}-{stage.last}]" for stage in chain) for chain in plan.chains]
    return " | ".join(chains)

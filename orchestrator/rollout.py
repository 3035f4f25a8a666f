"""PURE: the make-before-break protocol of one deployment (mathematics.md A5).

    propose --PREPARE--> candidate --all READY--COMMIT--> current, the old one drains --all DRAINED--RETIRE--> gone
                             `--refused, lost, too late--ABORT--> gone; the current plan never stopped serving

Where members or their keys changed since the last event, RESEAL says the same again, sealed for those of now.

`note` takes in what was heard; it never decides. `step` decides from the whole state, so a fact that comes
twice, late or out of order costs nothing. What `step` returns takes effect only once its event is in the log:
the caller publishes first and keeps the new state after.

Invariants (tests/properties/test_rollout.py): I2 no COMMIT before every node of the plan is READY; I4 at most
two live epochs, three only while a hard trigger supersedes a drain; I5 facts about other plans change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import assert_never

from schemas.base import DeploymentName, NodeId
from schemas.capacity import Capacity
from schemas.deployment import Placement
from schemas.errors import ErrorBody, ErrorCode
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus

PREPARE_TIMEOUT = timedelta(seconds=600)
"""Nodes may have to fetch gigabytes before they are READY; a node that dies meanwhile is noticed much sooner."""
DRAIN_TIMEOUT = timedelta(seconds=300)
"""A long answer at a few tokens a second; what is not finished then is computed anew on the plan in force."""
RETRY_FIRST = timedelta(seconds=1)
RETRY_LAST = timedelta(seconds=60)
"""Waits between attempts double from the first to the last: a node that keeps refusing is asked once a minute."""
SHUN = timedelta(seconds=120)
"""How long a node that refused is left out of plans that can do without it."""


@dataclass(frozen=True)
class Candidate:
    """A plan that nodes are preparing."""

    plan: Plan
    since: datetime
    ready: frozenset[NodeId] = frozenset()
    fault: str | None = None
    """A node's refusal: it cannot become current any more."""


@dataclass(frozen=True)
class Draining:
    """A plan that takes no new request, until each node in `waiting` has finished the last one that it answers.

    Not only where its routes begin: whoever was an ingress before has sequences that crossed to this plan.
    """

    plan: Plan
    since: datetime
    waiting: frozenset[NodeId]


@dataclass(frozen=True)
class Rollout:
    """Where one deployment stands. A removed one stays as a tombstone: its epochs never start again."""

    deployment: DeploymentName
    term: int
    revision: int = 0
    epoch: int = 0
    """The highest epoch ever proposed."""
    current: Plan | None = None
    current_since: datetime | None = None
    applied: frozenset[NodeId] = frozenset()
    """Nodes that reported the current plan as theirs."""
    current_faults: Mapping[NodeId, str] = field(default_factory=dict)
    """Nodes that cannot run the current plan (any more), each in its own words."""
    candidate: Candidate | None = None
    draining: tuple[Draining, ...] = ()
    failures: int = 0
    """Attempts since the last COMMIT that came to nothing."""
    retry_at: datetime | None = None
    last_error: ErrorBody | None = None
    """What the last attempt failed with."""
    refused: Mapping[NodeId, datetime] = field(default_factory=dict)
    """Who refused the last attempts, and when."""
    answering: frozenset[NodeId] = frozenset()
    """Where routes of plans in force have begun since there are any. Whoever was an ingress goes on with requests that
    it accepted, over plans on which it may have no part; so does a process that began with an old event."""
    roster: int = 0
    """The version of the roster that the last event was sealed by."""
    loads_s: float | None = None
    """How long nodes last took to load a plan where nothing was loaded; None where this leader has not seen it."""
    loaded: Placement = ()
    """Of a cold one: where its blocks were loaded last."""
    asked_since: datetime | None = None
    """When somebody asked for it, of a cold one that was asked for,"""
    woke_s: float | None = None
    """and how long it then took last time until it was loaded: others may have had to make room."""

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Every plan whose blocks are to stay loaded."""
        found = (
            *(old.plan for old in self.draining),
            self.current,
            self.candidate.plan if self.candidate is not None else None,
        )
        return tuple(plan for plan in found if plan is not None)

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset(NodeId(node) for plan in self.plans for node in plan.nodes)

    def shunned(self, now: datetime) -> frozenset[NodeId]:
        return frozenset(node for node, at in self.refused.items() if now - at < SHUN)


@dataclass(frozen=True)
class NodeRestarted:
    """A node's process is a new one: whatever it had ready or in flight is gone."""

    node: NodeId
    heard_at: datetime
    """When the process before it was last heard: what came later is the word of the new one."""


Fact = Receipt | NodeRestarted | Capacity


def note(rollout: Rollout, fact: Fact, now: datetime) -> Rollout:
    """Take in what was heard. Facts about plans that are not live change nothing."""
    match fact:
        case Receipt():
            return _note_receipt(rollout, fact, now)
        case NodeRestarted(node, heard_at):
            return _without(rollout, node, heard_at)
        case Capacity():
            return _note_hosted(rollout, fact)
        case _:
            assert_never(fact)


def _note_receipt(rollout: Rollout, receipt: Receipt, now: datetime) -> Rollout:
    node = receipt.node
    candidate, current = rollout.candidate, rollout.current
    match receipt.status:
        case ReceiptStatus.READY:
            if candidate is not None and _is_from(receipt, candidate.plan):
                return replace(rollout, candidate=replace(candidate, ready=candidate.ready | {node}))
        case ReceiptStatus.REFUSED:
            why = receipt.error or "it gave no reason"
            if candidate is not None and _is_from(receipt, candidate.plan):
                fault = candidate.fault or f"node {node} refused: {why}"
                refused = {**rollout.refused, node: now}
                return replace(rollout, candidate=replace(candidate, fault=fault), refused=refused)
            if current is not None and _is_from(receipt, current):
                refused = {**rollout.refused, node: now}
                return replace(rollout, current_faults={**rollout.current_faults, node: why}, refused=refused)
            return _finished(rollout, receipt)  # it has nothing of it to finish, and will never say so
        case ReceiptStatus.APPLIED:
            if current is not None and _is_from(receipt, current):
                faults = {name: why for name, why in rollout.current_faults.items() if name != node}
                return replace(rollout, applied=rollout.applied | {node}, current_faults=faults)
        case ReceiptStatus.DRAINED:
            return _finished(rollout, receipt)
        case ReceiptStatus.RETIRED:
            pass  # the plan is gone from here already; the receipt is for the audit
        case _:
            assert_never(receipt.status)
    return rollout


def _finished(rollout: Rollout, receipt: Receipt) -> Rollout:
    """No drain waits for its node any more."""
    kept = tuple(
        replace(old, waiting=old.waiting - {receipt.node}) if _is_from(receipt, old.plan) else old
        for old in rollout.draining
    )
    return replace(rollout, draining=kept)


def _is_from(receipt: Receipt, plan: Plan) -> bool:
    return receipt.epoch == plan.epoch and receipt.node in plan.nodes and receipt.plan == plan.digest


def _note_hosted(rollout: Rollout, said: Capacity) -> Rollout:
    """A heartbeat that shows the candidate ready is as good as its receipt, which is said once: that of a process whose
    first heartbeat comes after it is forgotten as the word of the process before."""
    candidate = rollout.candidate
    if candidate is None or said.node in candidate.ready or said.node not in candidate.plan.nodes:
        return rollout
    plan = candidate.plan
    wanted = (plan.deployment, plan.epoch, plan.model, plan.blocks_on(said.node))
    ready = any(
        stage.state == "ready" and (stage.deployment, stage.epoch, stage.model, stage.blocks) == wanted
        for stage in said.stages
    )
    if not ready:
        return rollout
    return replace(rollout, candidate=replace(candidate, ready=candidate.ready | {NodeId(said.node)}))


def _without(rollout: Rollout, node: NodeId, heard_at: datetime) -> Rollout:
    """The node's process is gone: what it had ready, applied, refused or in flight says nothing any more.

    What was refused since it was last heard was refused by the new one, and no heartbeat would say it again. If it was
    the old one's last word all the same, the new one says APPLIED where it can run its part.
    """
    candidate, refused_at = rollout.candidate, rollout.refused.get(node)
    forgotten = frozenset[NodeId]() if refused_at is not None and refused_at > heard_at else frozenset({node})
    return replace(
        rollout,
        applied=rollout.applied - {node},
        current_faults={name: why for name, why in rollout.current_faults.items() if name not in forgotten},
        refused={name: at for name, at in rollout.refused.items() if name not in forgotten},
        candidate=replace(candidate, ready=candidate.ready - {node}) if candidate is not None else None,
        draining=tuple(replace(old, waiting=old.waiting - {node}) for old in rollout.draining),
    )


@dataclass(frozen=True)
class Propose:
    """Prepare this plan. `hard`: the current one is broken, so a drain under way is no reason to wait."""

    plan: Plan
    hard: bool = False


@dataclass(frozen=True)
class Abandon:
    """Give up the candidate: it is not what is wanted any more."""

    reason: str


@dataclass(frozen=True)
class Withdraw:
    """The deployment is to end: no candidate, and the current plan drains."""

    reason: str


@dataclass(frozen=True)
class Proceed:
    """Nothing new is wanted: take the next step that the facts allow, if any."""


Command = Propose | Abandon | Withdraw | Proceed


def may_propose(rollout: Rollout, hard: bool) -> bool:
    """At most one reconfiguration in flight, and no drain beside it unless the current plan is broken (I4)."""
    return rollout.candidate is None and len(rollout.draining) <= (1 if hard else 0)


def step(
    rollout: Rollout,
    command: Command,
    now: datetime,
    absent: frozenset[NodeId] = frozenset(),
    roster: int = 0,
) -> tuple[Rollout, PlanEvent] | None:
    """The next state and the event that announces it, or None where nothing is to be done.

    `absent` are the nodes that are lost now: none of them will become ready or finish anything. `roster` is the
    version of the roster by which events are sealed now. The state holds from the moment the event is in the log, not
    before.
    """
    taken = _step(rollout, command, now, absent)
    if taken is None and isinstance(command, Proceed) and rollout.revision > 0 and rollout.roster < roster:
        reason = f"sealed by roster {rollout.roster}; members and keys are now those of roster {roster}"
        taken = _event(rollout, PlanPhase.RESEAL, reason, now, absent)
    if taken is None:
        return None
    after, event = taken
    return replace(after, roster=roster), event.model_copy(update={"roster": roster})


def _step(
    rollout: Rollout, command: Command, now: datetime, absent: frozenset[NodeId]
) -> tuple[Rollout, PlanEvent] | None:
    match command:
        case Propose(plan, hard):
            return _prepare(rollout, plan, hard, now, absent)
        case Abandon(reason):
            return None if rollout.candidate is None else _abort(rollout, reason, now, None, absent)
        case Withdraw(reason):
            return _withdraw(rollout, reason, now, absent)
        case Proceed():
            return _proceed(rollout, now, absent)
        case _:
            assert_never(command)


def _prepare(
    rollout: Rollout, plan: Plan, hard: bool, now: datetime, absent: frozenset[NodeId]
) -> tuple[Rollout, PlanEvent] | None:
    if not may_propose(rollout, hard):
        return None
    assert plan.deployment == rollout.deployment
    assert plan.epoch > rollout.epoch, "an epoch is used once"
    after = replace(rollout, candidate=Candidate(plan, now), epoch=plan.epoch)
    return _event(after, PlanPhase.PREPARE, plan.reason, now, absent)


def _proceed(rollout: Rollout, now: datetime, absent: frozenset[NodeId]) -> tuple[Rollout, PlanEvent] | None:
    candidate = rollout.candidate
    if candidate is not None:
        missing = sorted(frozenset(candidate.plan.nodes) - candidate.ready)
        gone = sorted(absent.intersection(candidate.plan.nodes))
        if candidate.fault is not None:
            return _abort(rollout, candidate.fault, now, ErrorCode.STAGE_FAILED, absent)
        if gone:
            after, event = _abort(rollout, f"lost while preparing: {', '.join(gone)}", now, ErrorCode.NODE_LOST, absent)
            # The next plan does without them, so there is nothing to wait for; and requests may wait for that plan.
            return replace(after, retry_at=None), event
        if not missing:
            return _commit(rollout, candidate, now, absent)
        if now - candidate.since >= PREPARE_TIMEOUT:
            reason = f"after {PREPARE_TIMEOUT.seconds} s there is no answer from {', '.join(missing)}"
            return _abort(rollout, reason, now, ErrorCode.TIMEOUT, absent)
    for old in rollout.draining:
        if not old.waiting - absent or now - old.since >= DRAIN_TIMEOUT:
            after = replace(rollout, draining=tuple(other for other in rollout.draining if other is not old))
            silent = f"without word from {', '.join(sorted(old.waiting))}"
            reason = (
                f"epoch {old.plan.epoch} has drained" if not old.waiting else f"epoch {old.plan.epoch} ends {silent}"
            )
            # Whoever answers now for the requests of a node that was lost while its plan drained must hear of it.
            return _event(after, PlanPhase.RETIRE, reason, now, absent, frozenset(map(NodeId, old.plan.nodes)))
    return None


def _commit(
    rollout: Rollout, candidate: Candidate, now: datetime, absent: frozenset[NodeId]
) -> tuple[Rollout, PlanEvent]:
    waited_s = (now - candidate.since).total_seconds()
    from_nothing = (rollout.current is None or rollout.current.cold) and not candidate.plan.cold
    asked = rollout.asked_since if from_nothing else None
    loaded: Placement = ()
    if candidate.plan.cold and rollout.current is not None:
        loaded = rollout.loaded if rollout.current.cold else rollout.current.chains
    after = replace(
        rollout,
        current=candidate.plan,
        current_since=now,
        loads_s=waited_s if from_nothing else rollout.loads_s,
        loaded=loaded,
        asked_since=None,
        woke_s=rollout.woke_s if asked is None else (now - asked).total_seconds(),
        applied=frozenset(),
        current_faults={},
        candidate=None,
        draining=_drained(rollout, now),
        failures=0,
        retry_at=None,
        last_error=None,
        refused={},
    )
    reason = f"every node of epoch {candidate.plan.epoch} is ready after {waited_s:.1f} s"
    return _event(after, PlanPhase.COMMIT, reason, now, absent)


def _abort(
    rollout: Rollout, reason: str, now: datetime, code: ErrorCode | None, absent: frozenset[NodeId]
) -> tuple[Rollout, PlanEvent]:
    after = replace(rollout, candidate=None)
    if code is not None:
        after = failed(after, ErrorBody(code=code, message=reason), now)
    return _event(after, PlanPhase.ABORT, reason, now, absent)


def failed(rollout: Rollout, error: ErrorBody, now: datetime) -> Rollout:
    """An attempt came to nothing: remember why, and when to try again."""
    wait = min(RETRY_FIRST * 2 ** min(rollout.failures, 16), RETRY_LAST)
    return replace(rollout, failures=rollout.failures + 1, retry_at=now + wait, last_error=error)


def _withdraw(
    rollout: Rollout, reason: str, now: datetime, absent: frozenset[NodeId]
) -> tuple[Rollout, PlanEvent] | None:
    if rollout.current is None and rollout.candidate is None:
        return None
    after = replace(
        rollout,
        current=None,
        current_since=None,
        applied=frozenset(),
        current_faults={},
        candidate=None,
        draining=_drained(rollout, now),
        failures=0,
        retry_at=None,
        last_error=None,
        refused={},
    )
    phase = PlanPhase.RETIRE if rollout.current is not None else PlanPhase.ABORT
    return _event(after, phase, reason, now, absent)


def _drained(rollout: Rollout, now: datetime) -> tuple[Draining, ...]:
    """What drains once the current plan does too."""
    if rollout.current is None:
        return rollout.draining
    # A node that could not run its part has nothing to finish, and would never say so.
    working = frozenset(map(NodeId, rollout.current.nodes)) - rollout.current_faults.keys()
    return (*rollout.draining, Draining(rollout.current, now, working))


def _event(
    after: Rollout,
    phase: PlanPhase,
    reason: str,
    now: datetime,
    absent: frozenset[NodeId],
    ending: frozenset[NodeId] = frozenset(),
) -> tuple[Rollout, PlanEvent]:
    """`ending`: the nodes of a plan that ends with this event."""
    plans = (*(old.plan for old in after.draining), *((after.current,) if after.current is not None else ()))
    sources = frozenset(NodeId(route.source) for plan in plans for route in plan.routes)
    answering = after.answering | sources if after.plans else frozenset[NodeId]()
    after = replace(after, revision=after.revision + 1, answering=answering)
    event = PlanEvent(
        deployment=after.deployment,
        term=after.term,
        revision=after.revision,
        phase=phase,
        reason=reason,
        issued_at=now,
        current=after.current,
        candidate=after.candidate.plan if after.candidate is not None else None,
        draining=tuple(old.plan for old in after.draining),
        lost=tuple(sorted(absent & (after.nodes | ending))),
        answering=tuple(sorted(answering)),
        epoch=after.epoch,
    )
    return after, event


def recovered(event: PlanEvent, term: int, now: datetime) -> Rollout:
    """The state that `event`, the last one in the log, announced. Raises nothing: it was checked when it was made.

    A candidate in it was never committed, and who was READY may have restarted since: the caller abandons it
    first of all (A5, leader crash). Drains go on with their deadline counted anew.
    """
    candidate = event.candidate
    return Rollout(
        deployment=event.deployment,
        term=term,
        revision=event.revision,
        epoch=max([event.epoch, *(plan.epoch for plan in event.plans)]),
        current=event.current,
        current_since=now if event.current is not None else None,
        candidate=Candidate(candidate, now) if candidate is not None else None,
        draining=tuple(Draining(plan, now, frozenset(map(NodeId, plan.nodes))) for plan in event.draining),
        answering=frozenset(map(NodeId, event.answering)),
        roster=event.roster,
    )

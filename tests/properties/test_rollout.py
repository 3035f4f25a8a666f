"""What never happens during a rollout, whatever is heard in whatever order (mathematics.md A5)."""

from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.rollout import (
    DRAIN_TIMEOUT,
    PREPARE_TIMEOUT,
    Abandon,
    Command,
    NodeRestarted,
    Proceed,
    Propose,
    Rollout,
    Withdraw,
    may_propose,
    note,
    recovered,
    step,
)
from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Settings, Stage
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus, Route

NODES = [NodeId(name) for name in ("a", "b", "c")]
nodes = st.sampled_from(NODES)


def plan_of(epoch: int, order: list[NodeId]) -> Plan:
    stages = tuple(Stage(node=node, first=i, last=i) for i, node in enumerate(order))
    return Plan(
        deployment=DeploymentName("chat"),
        model=Digest("0" * 64),
        epoch=epoch,
        previous=None,
        block_count=len(order),
        settings=Settings(),
        routes=(Route(index=0, source=order[0], stages=stages, max_sequences=1),),
        reason="a test",
    )


class Rollouts(RuleBasedStateMachine):
    """Proposals, receipts true and false, losses, restarts, time, and orchestrators that die and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.rollout = Rollout(DeploymentName("chat"), term=1)
        self.log: list[PlanEvent] = []
        self.absent: frozenset[NodeId] = frozenset()
        self.really_ready: set[tuple[NodeId, int]] = set()
        """(node, epoch) that said READY and has not restarted since."""
        self.ever: list[Plan] = []
        self.superseded = False

    def take(self, command: Command) -> None:
        taken = step(self.rollout, command, self.now, self.absent)
        if taken is None:
            return
        before, (self.rollout, event) = self.rollout, taken
        if event.phase is PlanPhase.COMMIT:
            assert event.current is not None
            assert all((node, event.current.epoch) in self.really_ready for node in event.current.nodes), "I2"
            assert not self.absent.intersection(event.current.nodes)
        if event.phase is PlanPhase.RETIRE and before.current is event.current:
            (gone,) = [old for old in before.draining if old.plan not in event.draining]
            late = self.now - gone.since >= DRAIN_TIMEOUT
            assert late or not gone.waiting - self.absent, "nothing is freed while an ingress still uses it"
        self.log.append(event)

    @rule(order=st.permutations(NODES).flatmap(lambda p: st.integers(1, 3).map(lambda k: p[:k])), hard=st.booleans())
    def propose(self, order: list[NodeId], hard: bool) -> None:
        self.superseded |= hard
        plan = plan_of(self.rollout.epoch + 1, order)
        allowed = may_propose(self.rollout, hard)
        self.take(Propose(plan, hard))
        assert (self.rollout.candidate is not None and self.rollout.candidate.plan == plan) == allowed
        self.ever.append(plan)

    @precondition(lambda self: self.ever)
    @rule(data=st.data(), node=nodes, status=st.sampled_from(ReceiptStatus))
    def receipt(self, data: st.DataObject, node: NodeId, status: ReceiptStatus) -> None:
        # Of the last plans more often than of old ones, whose receipts must change nothing.
        plan = data.draw(st.sampled_from(self.ever[-3:]))
        if status is ReceiptStatus.READY:
            self.really_ready.add((node, plan.epoch))
        told = Receipt(
            node=node, deployment=plan.deployment, epoch=plan.epoch, plan=plan.digest, status=status, elapsed_ms=1
        )
        live = plan in self.rollout.plans
        before = self.rollout
        self.rollout = note(self.rollout, told, self.now)
        assert live or self.rollout == before, "I5"
        assert note(self.rollout, told, self.now) == self.rollout, "I5: once more changes nothing"
        self.take(Proceed())

    @precondition(lambda self: self.rollout.candidate is not None)
    @rule()
    def everyone_is_ready(self) -> None:
        assert self.rollout.candidate is not None
        plan = self.rollout.candidate.plan
        for node in plan.nodes:
            self.really_ready.add((NodeId(node), plan.epoch))
            told = Receipt(
                node=NodeId(node),
                deployment=plan.deployment,
                epoch=plan.epoch,
                plan=plan.digest,
                status=ReceiptStatus.READY,
                elapsed_ms=1,
            )
            self.rollout = note(self.rollout, told, self.now)
        self.take(Proceed())

    @rule(node=nodes)
    def lose(self, node: NodeId) -> None:
        self.absent |= {node}
        self.take(Proceed())

    @rule(node=nodes)
    def restart(self, node: NodeId) -> None:
        self.absent -= {node}
        self.really_ready = {(other, epoch) for other, epoch in self.really_ready if other != node}
        self.rollout = note(self.rollout, NodeRestarted(node, self.now), self.now)
        self.take(Proceed())

    @rule(seconds=st.sampled_from([1, 60, 300, 600]))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.take(Proceed())

    @rule()
    def abandon(self) -> None:
        self.take(Abandon("a test"))

    @rule()
    def withdraw(self) -> None:
        self.take(Withdraw("a test"))
        assert self.rollout.current is None
        assert self.rollout.candidate is None

    @precondition(lambda self: self.log)
    @rule()
    def orchestrator_dies(self) -> None:
        """Only the log survives."""
        before = self.rollout
        self.rollout = recovered(self.log[-1], before.term + 1, self.now)
        assert self.rollout.plans == before.plans
        assert (self.rollout.revision, self.rollout.epoch) == (before.revision, before.epoch)
        self.take(Abandon("the orchestrator restarted"))
        assert self.rollout.candidate is None

    @invariant()
    def the_log_grows_and_its_last_event_is_the_state(self) -> None:
        assert [event.revision for event in self.log] == list(range(1, len(self.log) + 1))
        assert [event.term for event in self.log] == sorted(event.term for event in self.log)
        if self.log:
            assert self.log[-1].plans == self.rollout.plans

    @invariant()
    def few_epochs_live_at_once(self) -> None:
        # A withdrawal may add one to what drains; it is not a reconfiguration, and nothing can be proposed beside it.
        limit = 3 if self.superseded else 2
        assert len(self.rollout.plans) <= limit, "I4"

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        candidate = self.rollout.candidate
        assert candidate is None or self.now - candidate.since < PREPARE_TIMEOUT
        # Each step retires one plan, and a tick takes steps until there is none left.
        settled = step(self.rollout, Proceed(), self.now, self.absent) is None
        assert not settled or all(self.now - old.since < DRAIN_TIMEOUT for old in self.rollout.draining)


Rollouts.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestRollouts = Rollouts.TestCase

"""Never two leaders: whatever is delayed, lost, stale or slept through, and though no two clocks agree."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from orchestrator.lease import (
    LEASE_S,
    MARGIN_S,
    RENEW_S,
    Answer,
    Deposed,
    Follower,
    Leader,
    Refused,
    Silent,
    State,
    Stored,
    answered,
    due_at,
    leads,
)

PROCESSES = range(2)
processes = st.sampled_from(PROCESSES)
paces = st.floats(LEASE_S - MARGIN_S, LEASE_S).map(lambda s: s / LEASE_S)
"""How fast a process's clock runs beside the server's, down to the slowest that the margin allows."""


@dataclass(frozen=True)
class Write:
    """A compare-and-set on its way. `value` is the claim it stores; None deletes."""

    process: int
    number: int
    value: str | None
    last: int
    """The revision it expects; 0 where the key must not be there."""


@dataclass(frozen=True)
class Reply:
    """The server's answer on its way."""

    process: int
    number: int
    stored: int | None


@dataclass
class Server:
    """One key with a time to live."""

    revision: int = 0
    value: str | None = None
    stored_at: float = 0.0
    history: list[tuple[int, str | None]] = field(default_factory=lambda: [(0, None)])
    """What a read may show: what is there, or anything that was."""

    def take(self, write: Write, now: float) -> int | None:
        standing = self.revision if self.value is not None else 0
        if standing != write.last:
            return None
        self.revision += 1
        self.value, self.stored_at = write.value, now
        self.history.append((self.revision, write.value))
        return self.revision

    def expire(self, now: float) -> None:
        if self.value is not None and now - self.stored_at >= LEASE_S:
            self.value = None
            self.history.append((self.revision, None))


class Leases(RuleBasedStateMachine):
    """Two processes, one key, a network that delays anything for ever, and reads that may be old."""

    writes: Bundle[Write] = Bundle("writes")
    replies: Bundle[Reply] = Bundle("replies")

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        self.server = Server()
        self.states: list[State] = [Follower(0.0) for _ in PROCESSES]
        self.claims = [f"{p}.0" for p in PROCESSES]
        self.waiting: list[tuple[int, float] | None] = [None for _ in PROCESSES]
        """(number of the write, local time it was sent at) of those that wait for an answer."""
        self.count = 0
        self.paces = [1.0 for _ in PROCESSES]

    @initialize(paces=st.tuples(*(paces for _ in PROCESSES)))
    def clocks(self, paces: tuple[float, ...]) -> None:
        self.paces = list(paces)

    def clock(self, process: int) -> float:
        return self.time * self.paces[process] + 17 * process

    @rule(seconds=st.sampled_from([0.25, RENEW_S, LEASE_S - MARGIN_S, LEASE_S]))
    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.server.expire(self.time)

    def send(self, process: int) -> Write:
        state = self.states[process]
        assert not isinstance(state, Deposed)
        self.count += 1
        self.waiting[process] = (self.count, self.clock(process))
        return Write(process, self.count, self.claims[process], state.revision if isinstance(state, Leader) else 0)

    def heard(self, process: int, answer: Answer) -> None:
        state, waited = self.states[process], self.waiting[process]
        assert waited is not None
        assert not isinstance(state, Deposed)
        self.waiting[process] = None
        after = answered(state, answer, waited[1], self.clock(process))
        if isinstance(after, Deposed):
            self.follow(process)
        else:
            self.states[process] = after

    def follow(self, process: int) -> None:
        self.count += 1
        self.claims[process] = f"{process}.{self.count}"
        self.states[process], self.waiting[process] = Follower(self.clock(process)), None

    @rule(target=writes, process=processes)
    def write_when_due(self, process: int) -> Write | MultipleResults[Write]:
        state = self.states[process]
        assert not isinstance(state, Deposed)
        if self.waiting[process] is None and self.clock(process) >= due_at(state):
            return self.send(process)
        return multiple()

    @rule(target=replies, write=consumes(writes))
    def arrive(self, write: Write) -> Reply:
        return Reply(write.process, write.number, self.server.take(write, self.time))

    @rule(reply=consumes(replies), data=st.data())
    def answer(self, reply: Reply, data: st.DataObject) -> None:
        waited = self.waiting[reply.process]
        if waited is None or waited[0] != reply.number:
            return  # given up, or of a process that was started anew
        if reply.stored is not None:
            self.heard(reply.process, Stored(reply.stored))
            return
        revision, value = data.draw(st.sampled_from(self.server.history[-6:]), label="read")
        self.heard(reply.process, Refused(revision if value == self.claims[reply.process] else None))

    @rule(process=processes)
    def exchange(self, process: int) -> None:
        """Everything in time, as it mostly is."""
        state = self.states[process]
        assert not isinstance(state, Deposed)
        if self.waiting[process] is None and self.clock(process) >= due_at(state):
            stored = self.server.take(self.send(process), self.time)
            ours = self.server.revision if self.server.value == self.claims[process] else None
            self.heard(process, Stored(stored) if stored is not None else Refused(ours))

    @rule(process=processes)
    def nobody_answers(self, process: int) -> None:
        if self.waiting[process] is not None:
            self.heard(process, Silent())

    @rule(target=writes, process=processes)
    def end(self, process: int) -> Write | MultipleResults[Write]:
        """It is told to stop, or just ends; another one starts in its place."""
        state = self.states[process]
        self.follow(process)
        return Write(process, 0, None, state.revision) if isinstance(state, Leader) else multiple()

    @rule(process=processes, seconds=st.sampled_from([RENEW_S, LEASE_S - MARGIN_S]))
    def the_answer_is_slow(self, process: int, seconds: float) -> None:
        state = self.states[process]
        assert not isinstance(state, Deposed)
        if self.waiting[process] is None and self.clock(process) >= due_at(state):
            stored = self.server.take(self.send(process), self.time)
            self.wait(seconds)
            self.heard(process, Stored(stored) if stored is not None else Refused())

    @rule(process=processes)
    def the_answer_is_lost(self, process: int) -> None:
        state = self.states[process]
        assert not isinstance(state, Deposed)
        if self.waiting[process] is None and self.clock(process) >= due_at(state):
            self.server.take(self.send(process), self.time)
            self.heard(process, Silent())

    @precondition(lambda self: self.server.value is None)
    @rule(process=processes)
    def a_free_lease_is_had_by_asking(self, process: int) -> None:
        self.follow(process)
        self.exchange(process)
        assert leads(self.states[process], self.clock(process))

    @invariant()
    def never_two_leaders(self) -> None:
        leading = [p for p in PROCESSES if leads(self.states[p], self.clock(p))]
        assert len(leading) <= 1, leading
        for process in leading:
            assert self.server.value == self.claims[process], "who leads holds the lease"


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
class TestLeasesAtLength(TestLeases):  # type: ignore[misc, valid-type]
    """The same with more stories."""

    settings = settings(max_examples=400, stateful_step_count=30, deadline=None)


def test_a_leader_whose_renewals_are_lost_stops_before_its_lease_can_expire() -> None:
    state = answered(Follower(0.0), Stored(1), sent_at=10.0, now=10.3)
    assert isinstance(state, Leader)
    assert due_at(state) == 10.0 + RENEW_S
    for now in (11.2, 11.9, 12.4):
        silent = answered(state, Silent(), sent_at=now - 0.5, now=now)
        assert isinstance(silent, Leader)
        state = silent
        assert leads(state, now)
    assert not leads(state, 10.0 + LEASE_S - MARGIN_S)
    renewed = answered(state, Stored(2), sent_at=12.6, now=12.7)
    assert leads(renewed, 12.8), "the key was still its own, so nobody led in between"


def test_a_renewal_whose_answer_was_lost_does_not_depose() -> None:
    state = answered(Leader(7, 12.5, 11.0), Refused(ours=8), sent_at=11.0, now=11.1)
    assert state == Leader(8, 12.5, 11.1)
    assert isinstance(answered(Leader(7, 12.5, 11.0), Refused(ours=7), 11.0, 11.1), Deposed)
    assert isinstance(answered(Leader(7, 12.5, 11.0), Refused(), 11.0, 11.1), Deposed)

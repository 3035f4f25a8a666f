"""The leader's office in a world: one leader after another over one log of plans."""

from collections import deque
from collections.abc import Callable, Collection, Sequence

from orchestrator.fold import ReceiptReceived, Report, Snapshot
from orchestrator.lease import LEASE_S
from orchestrator.staging import Advice
from schemas.base import NodeId
from schemas.plan import PlanEvent, PlanPhase
from simulator.books import Books
from simulator.foresight import Step
from simulator.kernel import Kernel
from simulator.model import Physics
from simulator.operators import Operators
from simulator.orchestrator import Leader, successor
from simulator.placing import Placer
from simulator.planlog import PlanLog
from simulator.policies import ByRule, Contender, Part, Planned
from simulator.scenario import Scenario
from simulator.trail import Trail

RECEIPTS_KEPT = 256


class Office:
    """Who leads now, and what outlives them: the log, what operators want, and receipts."""

    def __init__(
        self,
        scenario: Scenario,
        physics: Physics,
        contender: Contender,
        seed: int,
        steps: Sequence[Step],
        kernel: Kernel,
        trail: Trail,
        books: Books,
        deliver: Callable[[PlanEvent], None],
        advise: Callable[[NodeId, Advice], None],
        foresee: Callable[[NodeId, Collection[int]], None],
    ) -> None:
        """`deliver` has agents hear of an event that is stored; the first of `steps` is locked from the beginning.
        `advise` is the leader's word on what to have on a disk, `foresee` that of whoever knows the run."""
        self._policy = contender.policy()
        self._kernel = kernel
        self._trail = trail
        self._books = books
        self._deliver = deliver
        self._advise = advise if Part.STAGING in contender.parts else None
        self._leader: Leader | None = None
        self._receipts: deque[ReceiptReceived] = deque(maxlen=RECEIPTS_KEPT)
        """They are stored: the next leader reads them all."""
        one_route = isinstance(contender.placing, ByRule) or contender.placing == Planned(once=True)
        self.log = PlanLog(kernel, books)
        self.operators = Operators(
            scenario, physics, kernel, self.log, books, self._known, self.report, one_route=one_route
        )
        self.placer = Placer(contender, seed, steps, kernel, self.operators, self._known, foresee)

    def open(self) -> None:
        """The first leader takes office."""
        self._lead(self.operators.stored)
        self.placer.open()

    @property
    def term(self) -> int | None:
        """That of the leader, if there is one."""
        return None if self._leader is None else self._leader.mind.snapshot.term

    def report(self, report: Report) -> None:
        """Something that a leader hears, if there is one."""
        if isinstance(report, ReceiptReceived):
            self._receipts.append(report)
        if self._leader is not None:
            self._leader.report(report)

    def kill(self) -> None:
        """The leader ends; the next one leads once its lease is over."""
        leader, self._leader = self._leader, None
        if leader is None:
            return
        leader.stop()
        self._books.planner_s += leader.spent_s
        before = leader.mind.snapshot

        def take_over() -> None:
            log = self.log
            now = self._lead(successor(before, self.operators.stored, log.last, self._kernel.date))
            for receipt in tuple(self._receipts):
                now.report(receipt)

        self._kernel.after(LEASE_S, take_over)

    def close(self) -> None:
        """The run is over."""
        if self._leader is not None:
            self._books.planner_s += self._leader.spent_s

    def _lead(self, snapshot: Snapshot) -> Leader:
        kernel = self._kernel
        self._leader = leader = Leader(
            kernel, self._policy, snapshot, self._trail, self._append, self._advise, lambda: kernel.date
        )
        return leader

    def _known(self) -> Snapshot | None:
        return None if self._leader is None else self._leader.mind.snapshot

    def _append(self, event: PlanEvent) -> None:
        """The log of plans: stored once, then delivered."""
        self.log.append(event)
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            self.placer.in_force(event.current.chains)
        self._deliver(event)

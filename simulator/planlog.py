"""The log of plans in a world: an event is stored once and is the whole state, and its rules are checked."""

from schemas.base import DeploymentName, NodeId
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus
from schemas.section import SeenPlan
from simulator.books import Books
from simulator.kernel import Kernel
from simulator.wishes import DEPLOYMENT

PLANS_MAX = 4
"""One in force, one that is prepared, and two that drain while a hard trigger supersedes one of them."""


class PlanLog:
    """Outlives every leader."""

    def __init__(self, kernel: Kernel, books: Books) -> None:
        self._kernel = kernel
        self._books = books
        self._ready: dict[str, set[NodeId]] = {}
        """By plan, the nodes that have said READY."""
        self._proposed_at: dict[str, float] = {}
        """By plan, when it was first in the log."""
        self.last: dict[DeploymentName, PlanEvent] = {}
        """Of each deployment."""
        self.epochs: dict[DeploymentName, int] = {}
        """The highest that was ever proposed."""

    @property
    def event(self) -> PlanEvent | None:
        """The last one of the deployment that every world has."""
        return self.last.get(DEPLOYMENT)

    @property
    def plan(self) -> Plan | None:
        """The one in force."""
        return None if self.event is None else self.event.current

    def ready(self, receipt: Receipt) -> None:
        """A node has said where it stands, whether the leader has heard it yet or not."""
        if receipt.status is ReceiptStatus.READY:
            self._ready.setdefault(receipt.plan, set()).add(receipt.node)

    def proposed_s(self, plan: SeenPlan) -> float:
        """When it came; now, if it is not in the log."""
        return self._proposed_at.get(plan.digest, self._kernel.now)

    def append(self, event: PlanEvent) -> None:
        self._check(event)
        self.last[event.deployment] = event
        for plan in event.plans:
            self._proposed_at.setdefault(plan.digest, self._kernel.now)
        newest = max([plan.epoch for plan in event.plans], default=0)
        self.epochs[event.deployment] = max(self.epochs.get(event.deployment, 0), newest)
        if event.phase is PlanPhase.ABORT:
            self._books.aborts += 1
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            self._books.in_force(event.current)

    def _check(self, event: PlanEvent) -> None:
        """I1, I2 and I4: epochs never come back, nothing is in force that its nodes were not ready for, and no more
        than so many plans are alive at once."""
        before = self.last.get(event.deployment)
        what = f"term {event.term}, revision {event.revision}"
        if before is not None and (event.term, event.revision) <= (before.term, before.revision):
            self._books.broken(f"{what} comes behind term {before.term}, revision {before.revision}")
        if len(event.plans) > PLANS_MAX:
            self._books.broken(f"{what}: {len(event.plans)} plans are alive")
        seen = self.epochs.get(event.deployment, 0)
        known = set() if before is None else {plan.epoch for plan in before.plans}
        for plan in event.plans:
            if plan.epoch <= seen and plan.epoch not in known:
                self._books.broken(f"{what}: epoch {plan.epoch} has come back")
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            unready = set(event.current.nodes) - self._ready.get(event.current.digest, set())
            if unready:
                self._books.broken(f"{what}: in force while {', '.join(sorted(unready))} had not said READY")

"""The leader's office in a world: what is stored, who leads, and the log of plans, whose rules are checked here."""

from collections.abc import Callable

from orchestrator.fold import DeploymentWritten, ManifestKnown, NodeWished, Report, Snapshot, fold
from orchestrator.lease import LEASE_S
from orchestrator.staging import Advice
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Chain, Deployment, NodeWish, Placement
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus
from simulator.books import Books
from simulator.kernel import EPOCH, Kernel
from simulator.machine import Machine
from simulator.model import DEPLOYMENT, Physics
from simulator.orchestrator import Leader, successor
from simulator.policies import Contender, placed
from simulator.scenario import Scenario
from simulator.trail import Trail

PLANS_MAX = 4
"""One in force, one that is prepared, and two that drain while a hard trigger supersedes one of them."""
PLACED_AT_S = 2.0
"""A static contender is placed once every node has reported."""


class Office:
    """One leader after another over one log."""

    def __init__(
        self,
        scenario: Scenario,
        physics: Physics,
        contender: Contender,
        seed: int,
        placement: Chain | None,
        kernel: Kernel,
        trail: Trail,
        books: Books,
        deliver: Callable[[PlanEvent], None],
        advise: Callable[[NodeId, Advice], None],
    ) -> None:
        """`deliver` has agents hear of an event that is stored; `placement` is locked from the beginning."""
        self._contender = contender
        self._seed = seed
        self._kernel = kernel
        self._trail = trail
        self._books = books
        self._deliver = deliver
        self._advise = advise
        self._wish = _desired(scenario, physics, contender, placement)
        self._stored = self._wishes(scenario, physics)
        self._locked = False
        self._leader: Leader | None = None
        self._ready: dict[str, set[str]] = {}
        """By plan, the nodes that have said READY."""
        self._epochs: dict[DeploymentName, int] = {}
        """The highest that was ever proposed."""
        self.log: dict[DeploymentName, PlanEvent] = {}
        """The last event of each deployment: an event is the whole state."""

    def open(self) -> None:
        """The first leader takes office."""
        self._lead(self._stored)
        if self._contender.static not in (None, "optimum"):
            self._kernel.at(PLACED_AT_S, self._place)

    def report(self, report: Report) -> None:
        if self._leader is not None:
            self._leader.report(report)

    def ready(self, receipt: Receipt) -> None:
        """A node has said where it stands, whether the leader has heard it yet or not."""
        if receipt.status is ReceiptStatus.READY:
            self._ready.setdefault(receipt.plan, set()).add(receipt.node)

    def kill(self) -> None:
        """The leader ends; the next one leads once its lease is over."""
        leader, self._leader = self._leader, None
        if leader is None:
            return
        leader.stop()
        self._books.planner_s += leader.spent_s
        before = leader.mind.snapshot
        self._kernel.after(LEASE_S, lambda: self._lead(successor(before, self.log, self._epochs, self._kernel.date)))

    def close(self) -> None:
        """The run is over."""
        if self._leader is not None:
            self._books.planner_s += self._leader.spent_s

    def check_load(self, machine: Machine, plan: Plan) -> None:
        """I6: no sensitive block is even prepared where it is not trusted."""
        secret = self._wish.sensitive_of(plan.block_count)
        if secret.intersection(plan.blocks_on(machine.name)) and machine.name in self.untrusted:
            self._books.broken(f"{machine.name} was given a sensitive block")

    @property
    def untrusted(self) -> frozenset[str]:
        """Nodes that operators do not trust; they say so of all before anything runs."""
        return frozenset(node for node, trusted in self._stored.trust.items() if not trusted)

    def _wishes(self, scenario: Scenario, physics: Physics) -> Snapshot:
        """What is stored before anything runs; a static contender's deployment is only once it is placed."""
        snapshot = fold(Snapshot(term=1), ManifestKnown(self._wish.model, physics.manifest), EPOCH)
        if self._contender.static in (None, "optimum"):
            snapshot = fold(snapshot, DeploymentWritten(self._wish), EPOCH)
        for site in scenario.sites:
            trusted = site.trusted if site.trusted is not None else scenario.kinds[site.node].trusted
            for node in site.members:
                snapshot = fold(snapshot, NodeWished(NodeWish(node=node, trusted=trusted)), EPOCH)
        return snapshot

    def _lead(self, snapshot: Snapshot) -> None:
        advise = self._advise if self._contender.stages_ahead else None
        kernel = self._kernel
        self._leader = Leader(
            kernel, self._contender.policy, snapshot, self._trail, self._append, advise, lambda: kernel.date
        )

    def _place(self) -> None:
        """Lock a static contender's plan, as an operator would; where its rule finds none, nothing is served."""
        if self._leader is None or self._contender.static is None:
            return
        chain = placed(self._contender.static, self._leader.mind.snapshot, self._wish, self._seed)
        if chain is not None:
            self.lock(chain)

    def lock(self, placement: Chain | Placement) -> None:
        """An operator wants it run like this."""
        deployment = self._wish.model_copy(update={"placement": placement, "stages": None, "routes": None})
        self._stored = fold(self._stored, DeploymentWritten(deployment), self._kernel.date)
        self.report(DeploymentWritten(deployment))

    def _append(self, event: PlanEvent) -> None:
        """The log of plans: stored once, then delivered."""
        self._check(event)
        self.log[event.deployment] = event
        newest = max([plan.epoch for plan in event.plans], default=0)
        self._epochs[event.deployment] = max(self._epochs.get(event.deployment, 0), newest)
        if event.phase is PlanPhase.ABORT:
            self._books.aborts += 1
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            self._books.in_force(event.current)
            if self._contender.static == "optimum" and not self._locked:
                self._locked, placement = True, event.current.chains
                self._kernel.after(0.0, lambda: self.lock(placement))
        self._deliver(event)

    def _check(self, event: PlanEvent) -> None:
        """I1, I2 and I4: epochs never come back, nothing is in force that its nodes were not ready for, and no more
        than so many plans are alive at once."""
        before = self.log.get(event.deployment)
        what = f"term {event.term}, revision {event.revision}"
        if before is not None and (event.term, event.revision) <= (before.term, before.revision):
            self._books.broken(f"{what} comes behind term {before.term}, revision {before.revision}")
        if len(event.plans) > PLANS_MAX:
            self._books.broken(f"{what}: {len(event.plans)} plans are alive")
        seen = self._epochs.get(event.deployment, 0)
        known = set() if before is None else {plan.epoch for plan in before.plans}
        for plan in event.plans:
            if plan.epoch <= seen and plan.epoch not in known:
                self._books.broken(f"{what}: epoch {plan.epoch} has come back")
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            unready = set(event.current.nodes) - self._ready.get(event.current.digest, set())
            if unready:
                self._books.broken(f"{what}: in force while {', '.join(sorted(unready))} had not said READY")


def _desired(scenario: Scenario, physics: Physics, contender: Contender, placement: Chain | None) -> Deployment:
    served = scenario.served
    alone = contender.static is not None and placement is None
    return Deployment(
        name=DEPLOYMENT,
        model=physics.digest,
        placement=placement,
        settings=served.settings,
        stages=served.stages if placement is None else None,
        routes=1 if alone else served.routes if placement is None else None,
        slo=served.slo,
        sensitive=served.sensitive,
    )

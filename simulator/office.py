"""The leader's office in a world: what is stored, who leads, and the log of plans, whose rules are checked here."""

from collections.abc import Callable, Sequence

from orchestrator.fold import DeploymentWritten, ManifestKnown, NodeWished, Report, Snapshot, fold
from orchestrator.lease import LEASE_S
from orchestrator.staging import Advice
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import StoredBlocks
from schemas.deployment import Chain, Deployment, NodeWish, Placement
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus
from simulator import petals
from simulator.books import Books
from simulator.draws import Draws
from simulator.foresight import Step
from simulator.kernel import EPOCH, Kernel
from simulator.machine import Machine
from simulator.model import Physics
from simulator.orchestrator import Leader, successor
from simulator.policies import Contender, Static, placed
from simulator.scenario import Scenario
from simulator.trail import Trail
from simulator.wishes import deployment_of, trusted_of

PLANS_MAX = 4
"""One in force, one that is prepared, and two that drain while a hard trigger supersedes one of them."""
PLACED_AT_S = 2.0
"""A contender that is placed by a rule is once every node has reported."""
LOOK_EVERY_S = 0.5
"""Whether servers of a swarm came or went."""
INSISTED_S = 30.0
"""A placement that was known beforehand to be best and is not in force by then is given up, where another may be made:
something has happened that nobody could know."""


class Office:
    """One leader after another over one log."""

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
    ) -> None:
        """`deliver` has agents hear of an event that is stored; the first of `steps` is locked from the beginning."""
        self._contender = contender
        self._policy = contender.decides()
        self._seed = seed
        self._kernel = kernel
        self._trail = trail
        self._books = books
        self._deliver = deliver
        self._advise = advise
        self._wish = deployment_of(scenario, physics)
        """As the operator has it, but for placements."""
        self._rule: Static | None = None if steps else contender.static
        if self._rule is not None:
            self._wish = self._wish.model_copy(update={"routes": 1})
        self._steps = tuple(steps)
        self._insisted: Placement | None = steps[0].placement if steps else None
        """A placement that is locked until it is in force, or for good."""
        self._stored = self._wishes(scenario, physics)
        self._locked = False
        self._swarm = petals.Swarm()
        self._looks, self._look_at_s = 0, 0.0
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
        if self._contender.swarms:
            self._kernel.every(LOOK_EVERY_S, self._look, PLACED_AT_S)
        elif self._rule not in (None, "optimum"):
            self._kernel.at(PLACED_AT_S, self._place)
        if self._contender.stages_ahead and len(self._steps) > 1:
            self._kernel.at(PLACED_AT_S, self._stage)
        for step in self._steps:
            self._kernel.at(step.begin_s, lambda step=step: self._insist(step.placement))  # type: ignore[misc]

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
        self._kernel.after(LEASE_S, lambda: self._succeed(before))

    def _succeed(self, before: Snapshot) -> None:
        """The next leader finds what was stored while nobody led."""
        self._lead(successor(before, self.log, self._epochs, self._kernel.date))
        for name, deployment in self._stored.deployments.items():
            if before.deployments.get(name) != deployment:
                self.report(DeploymentWritten(deployment))

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
        if self._insisted is not None:
            snapshot = fold(snapshot, DeploymentWritten(self._pinned(self._insisted)), EPOCH)
        elif not self._contender.swarms and self._rule in (None, "optimum"):
            snapshot = fold(snapshot, DeploymentWritten(self._wish), EPOCH)
        trusted = trusted_of(scenario)
        for site in scenario.sites:
            for node in site.members:
                snapshot = fold(snapshot, NodeWished(NodeWish(node=node, trusted=node in trusted)), EPOCH)
        return snapshot

    def _lead(self, snapshot: Snapshot) -> None:
        advise = self._advise if self._contender.stages_ahead else None
        kernel = self._kernel
        self._leader = Leader(kernel, self._policy, snapshot, self._trail, self._append, advise, lambda: kernel.date)

    def _place(self) -> None:
        """Lock a static contender's plan, as an operator would; where its rule finds none, nothing is served."""
        if self._leader is None or self._rule is None:
            return
        chain = placed(self._rule, self._leader.mind.snapshot, self._wish, self._seed)
        if chain is not None:
            self.lock(chain)

    def _look(self) -> None:
        """Have the swarm look where it should be, now and then and as soon as its servers are others, and lock what it
        comes to, if that is something new."""
        if self._leader is None:
            return
        snapshot, now = self._leader.mind.snapshot, self._kernel.now
        if now < self._look_at_s and snapshot.offered.keys() == self._swarm.runs.keys():
            return
        self._look_at_s = now + petals.PERIOD_S
        before, self._looks = self._swarm, self._looks + 1
        rng = Draws(self._seed).stream(f"petals {self._looks}")
        self._swarm = petals.balanced(snapshot, self._wish, before, rng)
        if self._swarm.placement != before.placement:
            self.lock(self._swarm.placement)

    def lock(self, placement: Chain | Placement) -> None:
        """An operator wants it run like this."""
        self._insisted = None
        self._write(self._pinned(placement))

    def _insist(self, placement: Placement) -> None:
        """Lock what was known beforehand to be best; where lost nodes are replaced, until it is in force."""
        self._write(self._pinned(placement))
        self._insisted = placement
        if self._contender.recovers:
            self._kernel.after(INSISTED_S, lambda: self._release(placement))

    def _stage(self) -> None:
        """What is known to be needed later is fetched ahead of need."""
        blocks: dict[NodeId, set[int]] = {}
        for stage in (stage for step in self._steps for chain in step.placement for stage in chain):
            blocks.setdefault(NodeId(stage.node), set()).update(stage.blocks)
        for node, needed in blocks.items():
            self._advise(node, (StoredBlocks.of(Digest(self._wish.model), needed),))

    def _release(self, placement: Placement) -> None:
        """From now on another may be made, should this one be lost."""
        if self._insisted == placement:
            self._insisted = None
            self._write(self._wish)

    def _pinned(self, placement: Chain | Placement) -> Deployment:
        return self._wish.model_copy(update={"placement": placement, "stages": None, "routes": None})

    def _write(self, deployment: Deployment) -> None:
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
            placement = event.current.chains
            if self._rule == "optimum" and not self._locked:
                self._locked = True
                self._kernel.after(0.0, lambda: self.lock(placement))
            if self._contender.recovers and placement == self._insisted:
                self._kernel.after(0.0, lambda: self._release(placement))
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

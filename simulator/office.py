"""The leader's office in a world: what is stored, who leads, and the log of plans, whose rules are checked here."""

from collections import deque
from collections.abc import Callable, Sequence

from orchestrator.fold import DeploymentWritten, ManifestKnown, NodeWished, ReceiptReceived, Report, Snapshot, fold
from orchestrator.lease import LEASE_S
from orchestrator.staging import Advice
from orchestrator.trial import check_distrust, check_drain, trial
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import StoredBlocks
from schemas.deployment import Chain, Deployment, NodeWish, Placement
from schemas.errors import ResplitError
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
from simulator.wishes import DEPLOYMENT, deployment_of, trusted_of

PLANS_MAX = 4
"""One in force, one that is prepared, and two that drain while a hard trigger supersedes one of them."""
PLANNING_S = 0.5
"""A plan that is in the log sooner than this after an operator's word may have been made before it."""
RECEIPTS_KEPT = 256
ASK_AGAIN_S = 1.0
"""An operator takes back what they wanted, however often they have to ask."""
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
        self._receipts: deque[ReceiptReceived] = deque(maxlen=RECEIPTS_KEPT)
        """They are stored: the next leader reads them all."""
        self._distrusted_at: dict[NodeId, float] = {}
        """Since when an operator does not trust a node."""
        self._proposed_at: dict[str, float] = {}
        """By plan, when it was first in the log."""
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
            self._kernel.at(step.begin_s, lambda step=step: self._insist(step.placement))

    def report(self, report: Report) -> None:
        if isinstance(report, ReceiptReceived):
            self._receipts.append(report)
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

        def take_over() -> None:
            self._lead(successor(before, self._stored, self.log, self._epochs, self._kernel.date))
            for receipt in tuple(self._receipts):
                self._leader.report(receipt)  # type: ignore[union-attr]

        self._kernel.after(LEASE_S, take_over)

    def close(self) -> None:
        """The run is over."""
        if self._leader is not None:
            self._books.planner_s += self._leader.spent_s

    def check_load(self, machine: Machine, plan: Plan) -> None:
        """I6: no sensitive block is even prepared where it was not trusted when that was planned."""
        secret = self._wish.sensitive_of(plan.block_count)
        planned_at = self._proposed_at.get(plan.digest, self._kernel.now) - PLANNING_S
        since = self._distrusted_at.get(machine.name, 0.0)
        untrusted = machine.name in self.untrusted and since < planned_at
        if untrusted and secret.intersection(plan.blocks_on(machine.name)):
            self._books.broken(f"{machine.name} was given a sensitive block")

    @property
    def untrusted(self) -> frozenset[str]:
        """Nodes that operators do not trust."""
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

    def lock_current(self, whether: bool) -> None:
        """An operator locks the placement that is in force, or leaves it to planning again."""
        event = self.log.get(DEPLOYMENT)
        if whether and (event is None or event.current is None):
            return
        if not whether and self._leader is None:
            self._kernel.after(ASK_AGAIN_S, lambda: self.lock_current(False))
            return
        placement = None if not whether or event is None or event.current is None else event.current.chains
        stages, routes = (self._wish.stages, self._wish.routes) if placement is None else (None, None)
        self._asked(self._wish.model_copy(update={"placement": placement, "stages": stages, "routes": routes}))

    def redeploy(self) -> None:
        """An operator deploys the model again with one token of context less."""
        settings = self._wish.settings
        fewer = settings.model_copy(update={"context_tokens": settings.context_tokens - 1})
        if self._asked(self._wish.model_copy(update={"settings": fewer})):
            self._wish = self._wish.model_copy(update={"settings": fewer})

    def wish(self, node: NodeId, kind: str, whether: bool) -> None:
        """An operator drains a node or trusts it no more, or takes that back."""
        leader, now = self._leader, self._kernel.date
        if leader is None:
            if not whether:  # nobody answers
                self._kernel.after(ASK_AGAIN_S, lambda: self.wish(node, kind, whether))
            return
        wish = self._stored.wish(node)
        if kind == "distrust" and node in self.untrusted.difference(self._distrusted_at):
            return  # it never was trusted
        if kind == "drain":
            wish = wish.model_copy(update={"drained": whether})
        else:
            wish = wish.model_copy(update={"trusted": not whether})
        try:
            if whether:
                (check_drain if kind == "drain" else check_distrust)(leader.mind.snapshot, node, now)
        except ResplitError:
            return  # it is refused
        if kind == "distrust" and whether:
            self._distrusted_at.setdefault(node, self._kernel.now)
        elif kind == "distrust":
            self._distrusted_at.pop(node, None)
        self._stored = fold(self._stored, NodeWished(wish), now)
        self.report(NodeWished(wish))

    def _asked(self, deployment: Deployment) -> bool:
        """Store what an operator wants, if it can run; False if it is refused, or nobody answers."""
        if self._leader is None:
            return False
        snapshot = self._leader.mind.snapshot
        try:
            trial(snapshot, deployment, snapshot.manifests[deployment.model])
        except ResplitError:
            return False
        self._write(deployment)
        return True

    def _append(self, event: PlanEvent) -> None:
        """The log of plans: stored once, then delivered."""
        self._check(event)
        self.log[event.deployment] = event
        for plan in event.plans:
            self._proposed_at.setdefault(plan.digest, self._kernel.now)
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

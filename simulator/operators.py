"""What operators ask for while a world runs, and what is stored of it for every leader to come."""

from collections.abc import Callable

from orchestrator.fold import DeploymentWritten, ManifestKnown, NodeWished, Report, Snapshot, fold
from orchestrator.trial import check_distrust, check_drain, trial
from schemas.base import NodeId
from schemas.deployment import Chain, Deployment, NodeWish, Placement
from schemas.errors import ResplitError
from schemas.section import SeenPlan
from simulator.books import Books
from simulator.kernel import EPOCH, Kernel
from simulator.machine import Machine
from simulator.model import Physics
from simulator.planlog import PlanLog
from simulator.scenario import Scenario
from simulator.wishes import deployment_of, trusted_of

PLANNING_S = 0.5
"""A plan that is in the log sooner than this after an operator's word may have been made before it."""
ASK_AGAIN_S = 1.0
"""They take back what they wanted, however often they have to ask."""


class Operators:
    """They ask whoever leads, who may refuse; while nobody does, nobody answers."""

    def __init__(
        self,
        scenario: Scenario,
        physics: Physics,
        kernel: Kernel,
        log: PlanLog,
        books: Books,
        known: Callable[[], Snapshot | None],
        report: Callable[[Report], None],
        *,
        one_route: bool,
    ) -> None:
        """`known` is the leader's snapshot, None while nobody leads; `report` tells the leader what is stored."""
        self._kernel = kernel
        self._log = log
        self._books = books
        self._known = known
        self._report = report
        self.wanted = deployment_of(scenario, physics)
        """Their deployment but for placements, which are locked and released."""
        if one_route:
            self.wanted = self.wanted.model_copy(update={"routes": 1})
        self.stored = fold(Snapshot(term=1), ManifestKnown(self.wanted.model, physics.manifest), EPOCH)
        trusted = trusted_of(scenario)
        for site in scenario.sites:
            for node in site.members:
                self.stored = fold(self.stored, NodeWished(NodeWish(node=node, trusted=node in trusted)), EPOCH)
        self._distrusted_at: dict[NodeId, float] = {}
        """Since when they do not trust a node that they trusted."""

    @property
    def untrusted(self) -> frozenset[str]:
        """Nodes that they do not trust."""
        return frozenset(node for node, trusted in self.stored.trust.items() if not trusted)

    def lock(self, placement: Chain | Placement) -> None:
        """They want it run like this."""
        self._write(self.wanted.model_copy(update={"placement": placement, "stages": None, "routes": None}))

    def release(self) -> None:
        """They leave it to planning."""
        self._write(self.wanted)

    def lock_current(self, whether: bool) -> None:
        """They lock the placement that is in force, or leave it to planning again."""
        plan = self._log.plan
        if whether and plan is None:
            return
        if not whether and self._known() is None:
            self._kernel.after(ASK_AGAIN_S, lambda: self.lock_current(False))
            return
        placement = None if not whether or plan is None else plan.chains
        stages, routes = (self.wanted.stages, self.wanted.routes) if placement is None else (None, None)
        self._asked(self.wanted.model_copy(update={"placement": placement, "stages": stages, "routes": routes}))

    def redeploy(self) -> None:
        """They deploy the model again with one token of context less."""
        settings = self.wanted.settings
        fewer = settings.model_copy(update={"context_tokens": settings.context_tokens - 1})
        anew = self.wanted.model_copy(update={"settings": fewer})
        if self._asked(anew):
            self.wanted = anew

    def wish(self, node: NodeId, kind: str, whether: bool) -> None:
        """They drain a node or trust it no more, or take that back."""
        known, now = self._known(), self._kernel.date
        if known is None:
            if not whether:  # nobody answers
                self._kernel.after(ASK_AGAIN_S, lambda: self.wish(node, kind, whether))
            return
        wish = self.stored.wish(node)
        if kind == "distrust" and node in self.untrusted.difference(self._distrusted_at):
            return  # it never was trusted
        if kind == "drain":
            wish = wish.model_copy(update={"drained": whether})
        else:
            wish = wish.model_copy(update={"trusted": not whether})
        try:
            if whether:
                (check_drain if kind == "drain" else check_distrust)(known, node, now)
        except ResplitError:
            return  # it is refused
        if kind == "distrust" and whether:
            self._distrusted_at.setdefault(node, self._kernel.now)
        elif kind == "distrust":
            self._distrusted_at.pop(node, None)
        self.stored = fold(self.stored, NodeWished(wish), now)
        self._report(NodeWished(wish))

    def check_load(self, machine: Machine, plan: SeenPlan) -> None:
        """I6: no sensitive block is even prepared where it was not trusted when that was planned."""
        secret = self.wanted.sensitive_of(plan.block_count)
        since = self._distrusted_at.get(machine.name, 0.0)
        untrusted = machine.name in self.untrusted and since < self._log.proposed_s(plan) - PLANNING_S
        if untrusted and secret.intersection(plan.blocks_on(machine.name)):
            self._books.broken(f"{machine.name} was given a sensitive block")

    def _asked(self, deployment: Deployment) -> bool:
        """Store what they want, if it can run; False if it is refused, or nobody answers."""
        known = self._known()
        if known is None:
            return False
        try:
            trial(known, deployment, known.manifests[deployment.model], self._kernel.date)
        except ResplitError:
            return False
        self._write(deployment)
        return True

    def _write(self, deployment: Deployment) -> None:
        self.stored = fold(self.stored, DeploymentWritten(deployment), self._kernel.date)
        self._report(DeploymentWritten(deployment))

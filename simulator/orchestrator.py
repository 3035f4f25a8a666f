"""The leader in virtual time: `orchestrator.mind` over the same snapshot, driven as `orchestrator.core` drives it."""

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime

from orchestrator.fold import Report, Snapshot, Tick
from orchestrator.mind import Mind
from orchestrator.outlook import Outlook
from orchestrator.rollout import Rollout, recovered
from orchestrator.scales import Turns
from orchestrator.staging import Advice, History, Plans, advice_for, due, permitted, remembered, to_stage
from orchestrator.steps import Append, Solve, Solved, Steps
from orchestrator.trigger import Policy
from orchestrator.weighing import weigh
from schemas.base import DeploymentName, NodeId
from schemas.errors import ResplitError
from schemas.plan import PlanEvent
from simulator.kernel import Kernel
from simulator.trail import Trail

TICK_S = 0.25
SOLVE_S = 0.05
"""What solving and weighing take in virtual time, whatever they took here: a seed gives one run on any machine."""
APPEND_S = 0.002
"""Until an event is in the log."""
ADVISE_S = 1.0


class Leader:
    """One process that leads, from when it took office to its end."""

    def __init__(
        self,
        kernel: Kernel,
        policy: Policy,
        snapshot: Snapshot,
        trail: Trail,
        publish: Callable[[PlanEvent], None],
        advise: Callable[[NodeId, Advice], None] | None,
        now: Callable[[], datetime],
    ) -> None:
        """`publish` stores an event and has it delivered; `advise` tells a node what to have on its disk."""
        self._kernel = kernel
        self._policy = policy
        self._publish = publish
        self._advise = advise
        self.mind = Mind(snapshot, trail, now)
        self._waiting: deque[tuple[Report, datetime]] = deque()
        self._turns = Turns()
        self._found: Outlook | None = None
        self._weighing = False
        self._busy = False
        self._due = False
        self.alive = True
        self.spent_s = 0.0
        """Processor time of this machine spent deciding."""
        self._plans: Plans = {}
        self._history: History = ()
        self._said: dict[NodeId, tuple[str, Advice, datetime]] = {}
        self._perform(self.mind.begin())
        kernel.every(TICK_S, self._wake)
        kernel.every(ADVISE_S, self._advise_all)

    def report(self, report: Report) -> None:
        if self.alive:
            self._waiting.append((report, self.mind.now()))
            self._wake()

    def stop(self) -> None:
        self.alive = False

    # `Weighs`.

    def put(self, snapshot: Snapshot, now: datetime) -> None:
        if self._weighing or self._found is not None:
            return
        name = self._turns.next(snapshot, now)
        if name is None:
            return
        self._weighing = True
        began = time.process_time()
        found: Outlook | None
        try:
            found = weigh(snapshot, name, self._policy, now)
        except ResplitError:
            found = None
        self.spent_s += time.process_time() - began

        def done() -> None:
            self._weighing, self._found = False, found
            self._wake()

        self._kernel.after(SOLVE_S, done)

    def take(self) -> Outlook | None:
        found, self._found = self._found, None
        return found

    # Steps.

    def _wake(self) -> bool:
        """Settle, or as soon as what is under way is done."""
        if not self.alive:
            return False
        if self._busy:
            self._due = True
            return True
        while self._waiting:
            report, at = self._waiting.popleft()
            self.mind.fold(report, at)
        self.mind.fold(Tick(), self.mind.now())
        self._perform(self.mind.settle(self))
        return True

    def _perform(self, steps: Steps) -> None:
        self._busy = True
        self._go_on(steps, None, None)

    def _go_on(self, steps: Steps, answer: Solved | None, error: ResplitError | None) -> None:
        if not self.alive:
            steps.close()
            return
        try:
            effect = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration:
            self._busy = False
            if self._due:
                self._due = False
                self._kernel.after(0.0, self._wake)
            return
        match effect:
            case Append(event):

                def stored() -> None:
                    if self.alive:
                        self._publish(event)
                    self._go_on(steps, None, None)

                self._kernel.after(APPEND_S, stored)
            case Solve(make):
                began = time.process_time()
                found: Solved | None = None
                refused: ResplitError | None = None
                try:
                    found = make()
                except ResplitError as why:
                    refused = why
                self.spent_s += time.process_time() - began
                self._kernel.after(SOLVE_S, lambda: self._go_on(steps, found, refused))

    # Staging.

    def _advise_all(self) -> bool:
        if not self.alive:
            return False
        if self._advise is None:
            return True
        snapshot, now = self.mind.snapshot, self.mind.now()
        self._plans = to_stage(snapshot, self._plans)
        self._history = remembered(self._history, self._plans, now)
        history = permitted(snapshot, self._history)
        wanted = {node: advice_for(node, history) for node in snapshot.offered}
        for node, advice in due(snapshot.present, wanted, self._said, now).items():
            self._advise(node, advice)
            self._said[node] = (snapshot.present[node].boot, advice, now)
        return True


def successor(
    before: Snapshot,
    stored: Snapshot,
    log: dict[DeploymentName, PlanEvent],
    now: datetime,
) -> Snapshot:
    """What the next leader begins with: what operators want, as it is stored, what it heard as a standby, and every
    rollout as the log has it."""
    term = before.term + 1
    rollouts: dict[DeploymentName, Rollout] = {name: recovered(event, term, now) for name, event in log.items()}
    return Snapshot(
        term=term,
        nodes=before.nodes,
        drained=stored.drained,
        trust=stored.trust,
        deployments=stored.deployments,
        manifests=before.manifests,
        rollouts=rollouts,
        watched={NodeId(node): now for rollout in rollouts.values() for node in rollout.nodes},
    )

"""PURE but for its memory: which deployments on demand are loaded, and which go cold for them, step by step.

Who goes is decided in `orchestrator.cold`, who is loaded ahead of need in `orchestrator.preloading`; here it is done.
"""

from collections.abc import Generator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol

from orchestrator.cold import Leaving, cold_plan, is_clearing, room_for, used
from orchestrator.decide import HARD, Cause, Need
from orchestrator.fold import Report, RolloutAdvanced, Snapshot
from orchestrator.preloading import LOOK, Expected, Preload, to_preload
from orchestrator.proposing import propose
from orchestrator.residency.memory import RULES, Keeping, Memory
from orchestrator.rollout import Command, Propose
from orchestrator.steps import Effect, Solve, Solved, Steps
from schemas.base import DeploymentName
from schemas.deployment import Deployment
from schemas.errors import ResplitError

ROOM_LOOK = timedelta(seconds=0.25)
"""Between two looks for room that others are making."""
BUSY_LOOK = timedelta(seconds=1)
"""While all that could make some run something."""
AHEAD_LOOK = timedelta(seconds=2)
"""After others were told to go cold for what nobody asks for yet."""
AHEAD_REST = timedelta(seconds=30)
"""After something was loaded that nobody had asked for: loading takes cores that others compute on, and this bounds
what share of them."""
ROOM_SHOWS = timedelta(seconds=5)
"""So long after room was made every heartbeat shows it, and nobody else has to make any."""


class Minded(Protocol):
    """What it does that with."""

    snapshot: Snapshot

    def now(self) -> datetime: ...
    def fold(self, report: Report, at: datetime) -> None: ...
    def replan(self, deployment: Deployment, need: Need) -> Steps: ...
    def take(
        self, name: DeploymentName, command: Command, cause: str | None = None, terms: Mapping[str, float] | None = None
    ) -> Generator[Effect, Solved, bool]: ...


class Residents:
    """Deployments on demand and the memory that they share."""

    def __init__(self, mind: Minded, keeping: Keeping) -> None:
        self._mind = mind
        self._keeping: Keeping = keeping
        self._memory: Memory[DeploymentName] = Memory()
        """What each is worth to memories."""
        self._room_until: dict[DeploymentName, datetime] = {}
        """For whom others went cold, and until when that is to have been enough."""
        self._expected = Expected()
        self._ahead: Preload | None = None
        """What is to be loaded ahead of need once there is room."""
        self._ahead_at: datetime | None = None
        """When that is looked at next."""

    def note(self, before: Snapshot, after: Snapshot, at: datetime) -> None:
        """Something was heard at `at`."""
        self._memory = used(self._memory, before, after, at.timestamp())

    def look_after(self) -> Steps:
        """Wait for room that is being made, and load what is worth it ahead of need."""
        snapshot, now = self._mind.snapshot, self._mind.now()
        until = now + ROOM_SHOWS if is_clearing(snapshot) else None
        self._room_until = {
            name: until or before
            for name, before in self._room_until.items()
            if before > now and _waits(snapshot, name)
        }
        if until is None and (self._ahead_at is None or now >= self._ahead_at) and self._may_preload(snapshot):
            self._expected = self._expected.heard(snapshot, now)
            ahead, self._ahead = self._ahead, None
            self._ahead_at = now + LOOK
            yield from self._preload() if ahead is None else self._load(ahead)

    def _may_preload(self, snapshot: Snapshot) -> bool:
        return self._keeping == "worth" and any(one.on_demand for one in snapshot.deployments.values())

    def make_room(self, deployment: Deployment, need: Need) -> Generator[Effect, Solved, bool]:
        """There is none. Others on demand make some; but one on demand that nobody waits for goes cold, or stays so. So
        does one for which a cloud answers, if others cannot help. Whether any of that helps."""
        if need.cause is Cause.EXPECTED:
            return True  # it is not asked for: whoever has the room now keeps it
        if not deployment.on_demand or need.cause is Cause.ASKED_FOR:
            if (yield from self._have_others_leave(deployment, need)):
                return True
            current = self._mind.snapshot.rollout(deployment.name).current
            is_cold = current is not None and current.cold and need.cause in (Cause.ASKED_FOR, Cause.NO_PLAN)
            if deployment.outside is None or is_cold:
                return False
        return (yield from self._cool(deployment, need.cause, f"{need.reason}, and there is no room"))

    def _have_others_leave(self, deployment: Deployment, need: Need) -> Generator[Effect, Solved, bool]:
        """Whether others on demand make room, or will."""
        snapshot, now, name = self._mind.snapshot, self._mind.now(), deployment.name
        if not any(one.on_demand for one in snapshot.deployments.values() if one.name != name):
            return False
        leaving: Solved = Leaving(())
        if now >= self._room_until.get(name, now):
            memory, rule = self._memory, RULES[self._keeping]
            leaving = yield Solve(
                lambda: room_for(snapshot, deployment, memory, rule, lambda world: fits(world, name, need, now), now)
            )
        if not isinstance(leaving, Leaving):
            return False
        again = now + (ROOM_LOOK if leaving.names or name in self._room_until else BUSY_LOOK)
        self._mind.fold(RolloutAdvanced(replace(snapshot.rollout(name), retry_at=again)), now)
        yield from self._clear(leaving.names, name, f"it makes room for {name}: {need.reason}")
        self._memory = self._memory.without(leaving.names)
        return True

    def _preload(self) -> Steps:
        snapshot, now, rates = self._mind.snapshot, self._mind.now(), self._expected.rates()
        if any(rollout.candidate is not None for rollout in snapshot.rollouts.values()):
            return  # something moves already: the next look will do
        need = Need(Cause.EXPECTED, "")
        found = yield Solve(lambda: to_preload(snapshot, rates, lambda w, name: fits(w, name, need, now), now))
        if isinstance(found, Preload):
            yield from self._clear(found.leaving, found.name, f"it makes room for {found.name}: {found.why}")
            if found.leaving:
                self._ahead, self._ahead_at = found, now + AHEAD_LOOK
            else:
                yield from self._load(found)

    def _load(self, ahead: Preload) -> Steps:
        deployment = self._mind.snapshot.deployments.get(ahead.name)
        current = self._mind.snapshot.rollout(ahead.name).current
        if deployment is not None and current is not None and current.cold:
            self._ahead_at = self._mind.now() + AHEAD_REST
            yield from self._mind.replan(deployment, Need(Cause.EXPECTED, ahead.why))

    def _clear(self, names: tuple[DeploymentName, ...], whom: DeploymentName, why: str) -> Steps:
        for name in names:
            if name in self._mind.snapshot.deployments:
                yield from self._cool(self._mind.snapshot.deployments[name], Cause.MAKES_ROOM, why)
                self._room_until[whom] = self._mind.now() + ROOM_SHOWS

    def _cool(self, deployment: Deployment, cause: Cause, why: str) -> Generator[Effect, Solved, bool]:
        """Have a deployment go cold; whether it can."""
        manifest = self._mind.snapshot.manifests.get(deployment.model)
        if manifest is None:
            return False
        try:
            proposal = cold_plan(self._mind.snapshot, deployment, manifest, why)
        except ResplitError:
            return False
        return (yield from self._mind.take(deployment.name, Propose(proposal.plan, cause in HARD), cause.value))


def _waits(snapshot: Snapshot, name: DeploymentName) -> bool:
    """Whether a deployment has not got the plan yet for which room was made."""
    rollout = snapshot.rollout(name)
    return rollout.candidate is None and rollout.retry_at is not None and name in snapshot.deployments


def fits(world: Snapshot, name: DeploymentName, need: Need, now: datetime) -> bool:
    """PURE: whether a deployment could be planned."""
    try:
        propose(world, world.deployments[name], need, now)
    except ResplitError:
        return False
    return True

"""Weighs plans in a thread, one deployment at a time: each once a planning period, and sooner where it has changed."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from bus.supervision import Work
from orchestrator.fold import Snapshot
from orchestrator.outlook import Outlook
from orchestrator.trigger import PLANNING_PERIOD_S, Policy, burns
from orchestrator.weighing import weigh, weighable
from schemas.base import DeploymentName, NodeId

PERIOD = timedelta(seconds=PLANNING_PERIOD_S)
SOONEST = timedelta(seconds=1)
"""No deployment is weighed more often."""
CHANGED = 1.5
"""A node that is so many times as slow as it was, or as fast, is a reason to weigh before the period is over: of 20 %
noise a second 8 % are left (`beliefs.SMOOTHING_S`)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """When a deployment was weighed last, and what its nodes took then."""

    at: datetime
    epochs: tuple[int, ...]
    """Of all plans that it had."""
    step_ms: Mapping[str, float]
    """One step of all blocks that ran there on each node of the plan in force."""
    per_s: float
    """Requests that arrived a second,"""
    burning: bool
    """and whether too many of them missed what is promised."""


class Turns:
    """Whose turn it is to be weighed."""

    def __init__(self) -> None:
        self._last: dict[DeploymentName, Turn] = {}

    def next(self, snapshot: Snapshot, now: datetime) -> DeploymentName | None:
        """The deployment that has waited longest, if one is due, whose turn is then over."""
        names = weighable(snapshot, now)
        self._last = {name: last for name, last in self._last.items() if name in snapshot.deployments}
        due = [name for name in names if self._is_due(name, snapshot, now)]
        if not due:
            return None
        name = min(due, key=lambda one: (one in self._last, self._last[one].at if one in self._last else now, one))
        self._last[name] = turn_of(snapshot, name, now)
        return name

    def _is_due(self, name: DeploymentName, snapshot: Snapshot, now: datetime) -> bool:
        last = self._last.get(name)
        if last is None or now - last.at >= PERIOD:
            return True
        return now - last.at >= SOONEST and has_changed(last, turn_of(snapshot, name, now))


def turn_of(snapshot: Snapshot, name: DeploymentName, now: datetime) -> Turn:
    """PURE: a deployment as it is now."""
    rollout = snapshot.rollout(name)
    step_ms: dict[str, float] = {}
    if rollout.current is not None:
        model = rollout.current.model
        for node in map(NodeId, rollout.current.nodes):
            if node in snapshot.nodes and (times := snapshot.nodes[node].times.get(model)) is not None:
                step_ms[node] = float(times.decode_ms.sum())
    arrivals = snapshot.arrivals.get(name)
    per_s = 0.0 if arrivals is None else arrivals.per_s(now)
    fared = snapshot.attainment(name, now)
    burning = fared is not None and burns(fared.burn)
    return Turn(now, tuple(plan.epoch for plan in rollout.plans), step_ms, per_s, burning)


def has_changed(before: Turn, after: Turn) -> bool:
    """PURE: whether a deployment has other plans than it had, misses what it promises as it did not before, is asked
    much more, or has a node that takes much more or less."""
    if before.epochs != after.epochs or (after.burning and not before.burning):
        return True
    if after.per_s > CHANGED * before.per_s:
        return True
    return any(
        not before.step_ms[node] / CHANGED < step_ms < before.step_ms[node] * CHANGED
        for node, step_ms in after.step_ms.items()
        if node in before.step_ms
    )


class Scales:
    """Solving may take seconds, and heartbeats must be heard meanwhile: what is weighed is a frozen snapshot."""

    def __init__(self, policy: Policy, on_done: Callable[[], object], work: Work | None = None) -> None:
        self._policy = policy
        self._on_done = on_done
        self._work = work or Work()
        self._turns = Turns()
        self._task: asyncio.Task[Outlook] | None = None

    def put(self, snapshot: Snapshot, now: datetime) -> None:
        """Begin with the deployment that has waited longest, if one is due and nothing is being weighed."""
        if self._task is not None:
            return
        name = self._turns.next(snapshot, now)
        if name is None:
            return
        weighed = partial(weigh, snapshot, name, self._policy, now)
        self._task = asyncio.create_task(asyncio.to_thread(self._work.watched(weighed)))
        self._task.add_done_callback(lambda _: self._on_done())

    def take(self) -> Outlook | None:
        """What was found since, once."""
        if self._task is None or not self._task.done():
            return None
        task, self._task = self._task, None
        try:
            return task.result()
        except Exception:  # a fault in weighing must not end what serves; the next period tries again
            log.exception("a plan could not be weighed")
            return None

    def stop(self) -> None:
        """Weigh no more."""
        if self._task is not None:
            self._task.cancel()

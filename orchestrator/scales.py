"""Weighs plans in a thread, one deployment at a time, each once a planning period."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from orchestrator.fold import Snapshot
from orchestrator.outlook import Outlook
from orchestrator.trigger import PLANNING_PERIOD_S, Policy
from orchestrator.weighing import weigh, weighable
from schemas.base import DeploymentName

PERIOD = timedelta(seconds=PLANNING_PERIOD_S)

log = logging.getLogger(__name__)


class Turns:
    """Whose turn it is to be weighed."""

    def __init__(self) -> None:
        self._begun: dict[DeploymentName, datetime] = {}

    def next(self, snapshot: Snapshot, now: datetime) -> DeploymentName | None:
        """The deployment that has waited longest, if one is due, whose turn is then over."""
        names = weighable(snapshot, now)
        self._begun = {name: at for name, at in self._begun.items() if name in snapshot.deployments}
        due = [name for name in names if name not in self._begun or now - self._begun[name] >= PERIOD]
        if not due:
            return None
        name = min(due, key=lambda one: (one in self._begun, self._begun.get(one, now), one))
        self._begun[name] = now
        return name


class Scales:
    """Solving may take seconds, and heartbeats must be heard meanwhile: what is weighed is a frozen snapshot."""

    def __init__(self, policy: Policy, on_done: Callable[[], object]) -> None:
        self._policy = policy
        self._on_done = on_done
        self._turns = Turns()
        self._task: asyncio.Task[Outlook] | None = None

    def put(self, snapshot: Snapshot, now: datetime) -> None:
        """Begin with the deployment that has waited longest, if one is due and nothing is being weighed."""
        if self._task is not None:
            return
        name = self._turns.next(snapshot, now)
        if name is None:
            return
        self._task = asyncio.create_task(asyncio.to_thread(weigh, snapshot, name, self._policy, now))
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

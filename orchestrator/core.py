"""The one place where the snapshot changes: reports in, and what `orchestrator.mind` makes of them performed."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import assert_never

from bus.audit import AuditTrail
from bus.supervision import Work
from orchestrator.fold import Report, Snapshot, Tick
from orchestrator.log import PlanLog
from orchestrator.mind import Mind
from orchestrator.residency.memory import Keeping
from orchestrator.scales import Scales
from orchestrator.steps import Append, Solve, Solved, Steps
from orchestrator.trigger import DEFAULT_POLICY, Policy
from schemas.errors import ResplitError

TICK_S = 0.25
"""A lost node is noticed this much late at most."""
WAITING_MAX = 10_000
"""Reports that wait while an event is being logged; beyond it heartbeats are dropped, the next ones say the same."""


def steady_clock() -> Callable[[], datetime]:
    """A clock that shows the time of day when it is made and from then on never jumps."""
    start, began = datetime.now(UTC), time.monotonic()
    return lambda: start + timedelta(seconds=time.monotonic() - began)


class Core:
    """Folds reports one at a time and performs what follows from them."""

    def __init__(
        self,
        snapshot: Snapshot,
        plans: PlanLog,
        audit: AuditTrail,
        now: Callable[[], datetime],
        policy: Policy = DEFAULT_POLICY,
        keeping: Keeping = "worth",
        work: Work | None = None,
    ) -> None:
        """`work` counts what runs in threads of this one's."""
        self._work = work or Work()
        self.now = now
        self.audit = audit
        self._mind = Mind(snapshot, audit, now, keeping)
        self._plans = plans
        self.policy = policy
        self._waiting: deque[tuple[Report, datetime, asyncio.Future[None] | None]] = deque(maxlen=WAITING_MAX)
        self._wake = asyncio.Event()
        self._scales = Scales(policy, self._wake.set, self._work)

    @property
    def snapshot(self) -> Snapshot:
        return self._mind.snapshot

    def report(self, report: Report) -> None:
        """Take in a report; it is folded before the next decision."""
        self._waiting.append((report, self.now(), None))
        self._wake.set()

    async def folded(self, report: Report, timeout_s: float) -> None:
        """Take in a report and wait until the snapshot shows it, at most `timeout_s`."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((report, self.now(), done))
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done, timeout_s)

    async def run(self) -> None:
        """React until cancelled. Raises `ResplitError(STALE_EPOCH)` once another orchestrator leads."""
        try:
            await self._run()
        finally:
            self._scales.stop()

    async def _run(self) -> None:
        await self._perform(self._mind.begin())
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                report, at, done = self._waiting.popleft()
                self._mind.fold(report, at)
                if done is not None and not done.done():
                    done.set_result(None)
            self._mind.fold(Tick(), self.now())
            await self._perform(self._mind.settle(self._scales))

    async def _perform(self, steps: Steps) -> None:
        answer: Solved | None = None
        error: ResplitError | None = None
        while True:
            try:
                effect = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration:
                return
            answer = error = None
            match effect:
                case Append(event):
                    await self._plans.append(event)
                case Solve(make):
                    try:
                        # Heartbeats must be heard meanwhile.
                        answer = await asyncio.to_thread(self._work.watched(make))
                    except ResplitError as refused:
                        error = refused
                case _:
                    assert_never(effect)

"""Whether the compute thread takes work: what the watchdog of an agent's process goes by.

A call that does nothing is put behind what waits, one at a time, and the thread gets on as long as it completes calls:
these or others. So an idle thread is found alive, and so is one that is busy for hours with calls that each end.

What is slow and what is hung differ only in time. An ingress gives a step up after two minutes at most
(`agent.driver`: four times thirty seconds, where nothing is known yet of how long its kind takes). A call that takes
longer computes for nobody, so a thread that completes nothing for so long is hung, and a new process serves sooner.
"""

import time
from collections.abc import Callable

from agent.compute import ComputeThread
from bus.supervision import Progress, Supervised

PATIENCE = 4
"""So many times as long as the event loop may the thread stand still: two minutes, with the unit's `WatchdogSec=30`."""


class Life:
    """An agent's process as its service manager sees it, from before it has connected."""

    def __init__(self, url: str) -> None:
        self._pulse: Pulse | None = None
        self._status: Callable[[], str] = lambda: f"waits for the NATS server at {url}"
        self.supervised = Supervised(self._trouble, lambda: self._status())  # noqa: PLW0108 - another one later

    def begun(self, compute: ComputeThread, status: Callable[[], str]) -> None:
        """It is connected, and `status` says in one line what it does."""
        self._pulse, self._status = Pulse(compute), status

    def _trouble(self, watchdog_s: float) -> str | None:
        return None if self._pulse is None else self._pulse.trouble(watchdog_s)


class Pulse:
    """Feels whether `compute` gets on; on the event loop."""

    def __init__(self, compute: ComputeThread, now: Callable[[], float] = time.monotonic) -> None:
        self._compute = compute
        self._now = now
        self._progress = Progress(now())
        self._asked = False

    def trouble(self, watchdog_s: float) -> str | None:
        """What is wrong with the thread, if it has completed nothing for `PATIENCE` times `watchdog_s`."""
        if not self._asked:
            self._asked = True
            self._compute.submit(lambda: None, self._answered)
        still_s = self._progress.stood_still_s(self._compute.completed, self._now())
        if still_s < PATIENCE * watchdog_s:
            return None
        return f"the compute thread has completed nothing for {still_s:.0f} s"

    def _answered(self, _: None) -> None:
        self._asked = False

"""Virtual time: what happens next, in an order that a seed fixes."""

import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""Virtual time 0 on the calendar."""


class Kernel:
    """Calls what is due, in order of time; what is due at the same time, in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        """Since the beginning: seconds, and milliseconds in `simulator.tiers`."""
        self.events = 0
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self._stopped = False

    @property
    def date(self) -> datetime:
        return EPOCH + timedelta(seconds=self.now)

    def at(self, when: float, call: Callable[..., object], *args: Any) -> None:
        """Call it then, with these arguments; at once, if that has passed."""
        heapq.heappush(self._due, (when if when > self.now else self.now, next(self._count), call, args))

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self.at(self.now + delay_s, call, *args)

    def every(self, period_s: float, call: Callable[[], object], first_s: float | None = None) -> None:
        """Call it again and again, until it says False."""

        def again() -> None:
            if call() is not False:
                self.after(period_s, again)

        self.after(period_s if first_s is None else first_s, again)

    def stop(self) -> None:
        """Let nothing follow what is being called now: time stands still."""
        self._stopped = True

    def run(self, until: float) -> None:
        """Everything that is due before `until`, unless it is stopped."""
        due = self._due
        while due and due[0][0] < until and not self._stopped:
            self.now, _, call, args = heapq.heappop(due)
            self.events += 1
            call(*args)
        if not self._stopped:
            self.now = max(self.now, until)

"""The compute thread of a simulated process."""

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from simulator.engine import Clockwork
from simulator.machine import Machine

T = TypeVar("T")


class SimCompute:
    """The compute thread: one call after the other, each as long as its engine says."""

    def __init__(self, machine: Machine, clock: Clockwork, frame_s: float, note_busy: Callable[[float], None]) -> None:
        self._frame_s = frame_s
        self._machine = machine
        self._clock = clock
        self._note_busy = note_busy
        self._waiting: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = deque()
        self._busy = False
        self._held = False

    def hold(self, held: bool) -> None:
        """Begin nothing more until it is held no longer."""
        self._held = held
        self._next()

    def submit(self, call: Callable[[], T], done: Callable[[T], None]) -> None:
        self._waiting.append((call, done))
        self._next()

    async def call(self, function: Callable[[], T]) -> T:
        """What takes no time: to install engines and to remove them."""
        return function()

    def _next(self) -> None:
        if self._busy or self._held or not self._waiting:
            return
        self._busy = True
        call, done = self._waiting.popleft()
        result = call()
        spent_s = self._clock.take()
        self._note_busy(spent_s)

        def over() -> None:
            self._busy = False
            done(result)
            self._next()

        self._machine.later(spent_s + (self._frame_s if spent_s else 0.0), over)

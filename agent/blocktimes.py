"""The times of this node's blocks as its calls show them, from the compute thread into the heartbeat."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from profiler.blocks import CALLS_MAX, Call, Running, block_times, keep, observe, rested, slowdown
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime
from schemas.section import SeenPlan

REST_S = 3.0
REST_SHARE = 0.01
"""A node that computed for less than this share of so long is at rest: what its last calls showed, or a stage that
takes next to nothing does, says nothing of what the next calls will take."""


class BlockTimes:
    """Takes note of calls in one thread and sums them up in another."""

    def __init__(self, node: NodeId, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: the clock of the calls, in seconds."""
        self._node = node
        self._now = now
        self._calls: deque[Call] = deque(maxlen=CALLS_MAX)
        self._running: Running = {}
        self._spent_us = 0
        """In calls, since the process began."""
        self._marks: deque[tuple[float, int]] = deque([(now() - REST_S, 0)])
        """What it was at earlier times, the first of them at least `REST_S` ago."""
        self.slowdown: float | None = None
        """How many times longer than at load time the times are that were last asked for."""

    def note(self, call: Call) -> None:
        """A call ended; one append, from the compute thread. Beyond `CALLS_MAX` in a heartbeat the oldest go."""
        self._calls.append(call)
        self._spent_us += call.compute_us

    @property
    def at_rest(self) -> bool:
        """Whether next to nothing was computed lately."""
        now_s = self._now()
        since_s, then_us = max((mark for mark in self._marks if mark[0] <= now_s - REST_S), default=self._marks[0])
        return self._spent_us - then_us < 1e6 * REST_SHARE * (now_s - since_s)

    def now(self, loaded: Mapping[tuple[Digest, int], BlockTime], plans: Iterable[SeenPlan]) -> tuple[BlockTime, ...]:
        """The present times of the blocks of `plans` on this node, given those measured when they were `loaded`."""
        calls = [self._calls.popleft() for _ in range(len(self._calls))]
        stages = {
            (plan.model, stage.first, stage.last)
            for plan in plans
            for stage in plan.placed.values()
            if stage.node == self._node
        }
        models = {model for model, _, _ in stages}
        self._marks.append((self._now(), self._spent_us))
        while len(self._marks) > 1 and self._marks[1][0] <= self._now() - REST_S:
            self._marks.popleft()
        self._running = keep(observe(self._running, calls, self._now(), loaded), stages)
        if self.at_rest:
            self._running = rested(self._running)
        self.slowdown = slowdown(self._running, loaded)
        return block_times(self._running, {key: value for key, value in loaded.items() if key[0] in models})

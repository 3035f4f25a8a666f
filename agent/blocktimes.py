"""The times of this node's blocks as its calls show them, from the compute thread into the heartbeat."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from profiler.blocks import CALLS_MAX, Call, Running, block_times, keep, observe, rested, slowdown
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime
from schemas.plan import Plan

REST_S = 3.0
"""Without a call for this long a node is at rest: what its last calls showed says nothing of what the next will."""


class BlockTimes:
    """Takes note of calls in one thread and sums them up in another."""

    def __init__(self, node: NodeId, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: the clock of the calls, in seconds."""
        self._node = node
        self._now = now
        self._calls: deque[Call] = deque(maxlen=CALLS_MAX)
        self._running: Running = {}
        self._last_s = -REST_S
        """When the last call ended."""
        self.slowdown: float | None = None
        """How many times longer than at load time the times are that were last asked for."""

    def note(self, call: Call) -> None:
        """A call ended; one append, from the compute thread. Beyond `CALLS_MAX` in a heartbeat the oldest go."""
        self._calls.append(call)
        self._last_s = call.ended_s

    @property
    def at_rest(self) -> bool:
        """Whether nothing was computed lately."""
        return self._now() - self._last_s >= REST_S

    def now(self, loaded: Mapping[tuple[Digest, int], BlockTime], plans: Iterable[Plan]) -> tuple[BlockTime, ...]:
        """The present times of the blocks of `plans` on this node, given those measured when they were `loaded`."""
        calls = [self._calls.popleft() for _ in range(len(self._calls))]
        stages = {
            (plan.model, stage.first, stage.last)
            for plan in plans
            for route in plan.routes
            for stage in route.stages
            if stage.node == self._node
        }
        models = {model for model, _, _ in stages}
        if self.at_rest:
            self._running = rested(self._running)
        self._running = keep(observe(self._running, calls, self._now(), loaded), stages)
        self.slowdown = slowdown(self._running, loaded)
        return block_times(self._running, {key: value for key, value in loaded.items() if key[0] in models})

"""The one thread that owns sessions and caches, and the queue in front of it.

The event loop does only I/O; the compute thread does only arithmetic. What runs next is decided, purely,
by `agent.batching`, at the moment the thread is free.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from statistics import median
from typing import Protocol, TypeVar

from agent.batching import Work, next_batch
from agent.stage import Queued, StageHost, StageOutput
from schemas.frame import Activation, Failure, SequenceId

ROWS_MAX = 256
"""Rows of one decode call: beyond this a call only grows longer."""

FRAMES = 64
"""What a frame costs besides is the median of so many calls, the latest ones."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Computes(Protocol):
    """Runs calls one after the other; `ComputeThread`."""

    def submit(self, call: Callable[[], T], done: Callable[[T], None], /) -> None: ...
    async def call(self, function: Callable[[], T], /) -> T: ...


class ComputeThread:
    """Runs calls one after the other, and hands each result back on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.completed = 0
        """Calls that have run, whatever came of them."""
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T], done: Callable[[T], None]) -> None:
        """Run `call`, which must not raise, on the thread; then `done` with its result on the loop."""

        def task() -> None:
            result = call()
            self._loop.call_soon_threadsafe(done, result)

        self._calls.put(task)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread, after what is queued already; its result or its exception."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # T may itself be None

        def task() -> None:
            try:
                outcome: tuple[T | None, BaseException | None] = (function(), None)
            except BaseException as error:
                outcome = (None, error)
            self._loop.call_soon_threadsafe(settle, *outcome)

        self._calls.put(task)
        return await future

    def stop(self) -> None:
        """End the thread once its queue is empty, and wait for it."""
        self._calls.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:  # a defect in one call must not leave the node without its compute thread
                log.exception("a call on the compute thread raised")
            self.completed += 1


@dataclass(frozen=True, slots=True)
class _Waiting:
    host: StageHost
    frame: Activation
    arrived_us: int


class StageQueue:
    """Frames that wait for the compute thread, over all deployments."""

    def __init__(
        self, compute: Computes, deliver: Callable[[list[StageOutput]], None], now_us: Callable[[], int]
    ) -> None:
        """`deliver` takes what each run produced, on the event loop."""
        self._compute = compute
        self._now_us = now_us
        self._deliver = deliver
        self._waiting: list[_Waiting] = []
        self._busy = False
        self._last_kind: str | None = None
        self._besides_us: deque[int] = deque(maxlen=FRAMES)

    @property
    def frame_ms(self) -> float | None:
        """What a decode frame takes from this queue and back to the loop, beside the time that its call computes."""
        return median(self._besides_us) / 1e3 if self._besides_us else None

    def put(self, host: StageHost, frame: Activation) -> None:
        """Queue a frame; it runs when the thread is free and its turn has come."""
        self._waiting.append(_Waiting(host, frame, self._now_us()))
        self._pump()

    def forget(self, deployment: str, epoch: int, sequences: frozenset[SequenceId]) -> None:
        """Drop waiting frames of sequences that ended on an epoch; rows among others' die at the stage."""
        of = (deployment, epoch)
        self._waiting = [
            w for w in self._waiting if (w.frame.deployment, w.frame.epoch) != of or not _all_in(w.frame, sequences)
        ]

    def _pump(self) -> None:
        if self._busy or not self._waiting:
            return
        if len(self._waiting) == 1:
            batch, self._waiting = self._waiting, []
        else:
            work = [Work(_engine_key(w), w.frame.kind, len(w.frame.items)) for w in self._waiting]
            chosen = next_batch(work, self._last_kind, ROWS_MAX)
            batch = [self._waiting[i] for i in chosen]
            left = set(chosen)
            self._waiting = [w for i, w in enumerate(self._waiting) if i not in left]
        self._last_kind = batch[0].frame.kind
        now = self._now_us()
        queued = [Queued(w.frame, now - w.arrived_us) for w in batch]
        self._busy = True
        host = batch[0].host
        self._compute.submit(lambda: host.run(queued), lambda frames: self._ran(frames, now))

    def _ran(self, frames: list[StageOutput], submitted_us: int) -> None:
        self._busy = False
        took_us = self._now_us() - submitted_us
        computed_us = max((f.times[-1].compute_us for f in frames if not isinstance(f, Failure)), default=None)
        if computed_us is not None and self._last_kind == "decode":
            self._besides_us.append(max(0, took_us - computed_us))
        # Sending first: the next node can begin while this one picks its next batch.
        try:
            self._deliver(frames)
        finally:
            self._pump()


def _engine_key(waiting: _Waiting) -> Hashable:
    return waiting.host.engine_key(waiting.frame)


def _all_in(frame: Activation, sequences: frozenset[SequenceId]) -> bool:
    return all(item.sequence in sequences for item in frame.items)

"""Queues of services in virtual time: of instances that work steadily, one request each, and of such that share what
comes to their node and whose rate is another in each slot."""

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Protocol

from simulator.kernel import Kernel

Done = Callable[[object], None]


class Pool(Protocol):
    """The instances of a service on a node."""

    def put(self, job: object) -> None:
        """Work on it when its turn comes."""

    @property
    def busy(self) -> float:
        """Requests that are there, for each instance."""

    def done_ms(self, at: float) -> float:
        """When one that came then would be done, if nothing came before it; known to nobody but who knows the
        future."""


class SteadyPool:
    """So many instances that take a request each, for the same time."""

    def __init__(self, kernel: Kernel, count: int, takes_ms: float, done: Done) -> None:
        self.count = count
        self._kernel, self._takes_ms, self._done = kernel, takes_ms, done
        self._free_ms = [0.0] * count
        heapify(self._free_ms)

    def put(self, job: object) -> None:
        ends = max(self._kernel.now, heappop(self._free_ms)) + self._takes_ms
        heappush(self._free_ms, ends)
        self._kernel.at(ends, lambda: self._done(job))

    @property
    def busy(self) -> float:
        return sum(max(0.0, at - self._kernel.now) for at in self._free_ms) / self._takes_ms / self.count

    def done_ms(self, at: float) -> float:
        return max(at, self._free_ms[0]) + self._takes_ms


class SharedPool:
    """Instances that work together on what is there, in the order in which it came.

    Each does in each slot what was drawn for it, the same whoever decides. One that goes stays until nothing waits.
    """

    def __init__(
        self, kernel: Kernel, slot_ms: float, work: float, does: Callable[[int, int], float], done: Done
    ) -> None:
        """`does(instance, slot)` is what it does, in MB."""
        self._kernel, self._slot_ms, self._work, self._does, self._done = kernel, slot_ms, work, does, done
        self.wanted = 0
        """Instances that take more; when none does, one works on until nothing waits."""
        self._jobs: deque[object] = deque()
        self._left = 0.0
        """Of the first job, MB."""
        self._since = 0.0
        self._turn = 0
        self._rates: dict[int, float] = {}

    @property
    def count(self) -> int:
        """Instances that there are, and are paid for."""
        return max(self.wanted, 1 if self._jobs else 0)

    def resize(self, count: int) -> None:
        if count == self.wanted:
            return
        self._work_off()
        self.wanted = count
        self._rates.clear()
        self._go_on()

    def put(self, job: object) -> None:
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._left, self._since = self._work, self._kernel.now
            self._go_on()

    @property
    def busy(self) -> float:
        return len(self._jobs) / max(1, self.count)

    def done_ms(self, at: float) -> float:
        if self._jobs:
            at = max(at, self._ends(self._since, self._left + self._work * (len(self._jobs) - 1)))
        return self._ends(at, self._work)

    def _go_on(self) -> None:
        """Have the first job end when it does."""
        self._turn += 1
        if self._jobs:
            turn = self._turn
            self._kernel.at(self._ends(self._since, self._left), lambda: self._ended(turn))

    def _ended(self, turn: int) -> None:
        if turn != self._turn:
            return
        job = self._jobs.popleft()
        self._left, self._since = self._work, self._kernel.now
        self._go_on()
        self._done(job)

    def _work_off(self) -> None:
        """What was done of the first job until now."""
        if not self._jobs:
            return
        at, now = self._since, self._kernel.now
        slot = int(at / self._slot_ms)
        while at < now:
            until = min(now, (slot + 1) * self._slot_ms)
            self._left -= (until - at) * self._rate(slot)
            at, slot = until, slot + 1
        self._left, self._since = max(self._left, 0.0), now

    def _ends(self, at: float, left: float) -> float:
        slot = int(at / self._slot_ms)
        while True:
            rate, until = self._rate(slot), (slot + 1) * self._slot_ms
            if left <= (until - at) * rate:
                return at + left / rate
            left -= (until - at) * rate
            at, slot = until, slot + 1

    def _rate(self, slot: int) -> float:
        """MB/ms."""
        if (found := self._rates.get(slot)) is None:
            found = sum(self._does(number, slot) for number in range(self.count)) / self._slot_ms
            self._rates[slot] = found
        return found

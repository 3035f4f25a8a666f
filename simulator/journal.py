"""The journal of requests in virtual time: what an ingress owes survives it, and a fence ends its life.

It stands where `bus.journal` and `bus.succession` do, which keep the same promises on JetStream.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from agent.generation import Generation
from schemas.base import DeploymentName, LifeId, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import Run
from simulator.machine import Machine

STORE_S = 0.0015
"""From an append to its acknowledgement."""
TRY_AGAIN_S = 0.1


@dataclass(eq=False)
class Owed:
    """One request that was accepted, and its tokens so far."""

    job: Generation
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Life:
    """What one life of an ingress has stored; it outlives the process."""

    name: LifeId
    deployment: DeploymentName
    owed: dict[int, Owed] = field(default_factory=dict)
    fenced_by: LifeId | None = None
    done: bool = False
    """Somebody has taken over all of it."""


Stream = dict[LifeId, Life]
"""The whole stream, by life."""


class SimJournal:
    """One life's way to write into the stream; in order, each append acknowledged a moment later."""

    def __init__(
        self,
        stream: Stream,
        life: Life,
        machine: Machine,
        reaches_bus: Callable[[], bool],
        on_superseded: Callable[[], None],
    ) -> None:
        """While the bus is out of reach nothing is stored; it waits, in order."""
        self._reaches_bus = reaches_bus
        self._waiting: deque[Callable[[], None]] = deque()
        self.life = stream.setdefault(life.name, life)
        self._machine = machine
        self._on_superseded = on_superseded
        self._handles = itertools.count()
        self._over = False

    def accept(self, job: Generation, tokens: Sequence[int], then: Callable[[int | None], None]) -> None:
        """`then` hears the request's handle once it is stored, or None if this life is over."""
        handle = next(self._handles)

        def store() -> None:
            self.life.owed[handle] = Owed(job, list(tokens))

        self._append(store, lambda: then(handle), lambda: then(None))

    def tokens(self, runs: Sequence[Run], stored: Callable[[], None]) -> None:
        def store() -> None:
            for run in runs:
                if (owed := self.life.owed.get(run.handle)) is not None:
                    owed.tokens.extend(run.tokens)

        self._append(store, stored)

    def end(self, handles: Iterable[int], how: str) -> None:
        ended = tuple(handles)

        def store() -> None:
            for handle in ended:
                self.life.owed.pop(handle, None)

        self._append(store, lambda: None)

    def confirm(self, stored: Callable[[], None]) -> None:
        self._append(lambda: None, stored)

    def _append(
        self, store: Callable[[], None], stored: Callable[[], None], refused: Callable[[], None] = lambda: None
    ) -> None:
        if self._over:
            refused()
            return

        def acknowledged() -> None:
            if self.life.fenced_by is not None:
                refused()
                if not self._over:
                    self._over = True
                    self._on_superseded()
                return
            store()
            stored()

        self._waiting.append(acknowledged)
        self._machine.later(STORE_S, self._next)

    def _next(self) -> None:
        if self._reaches_bus():
            self._waiting.popleft()()
        else:
            self._machine.later(TRY_AGAIN_S, self._next)


def fence(stream: Stream, life: LifeId, by: LifeId, over: LifeId | None) -> tuple[Owed, ...]:
    """Make `by` answer for what `life` owes; raises `ResplitError(NODE_LOST)` naming who came first."""
    found = stream[life]
    if found.fenced_by not in (None, by, over):
        raise ResplitError(ErrorCode.NODE_LOST, f"{found.fenced_by} took over from ingress {life}")
    found.fenced_by = by
    return tuple(found.owed[handle] for handle in sorted(found.owed))


def requests(owed: Iterable[Owed]) -> list[RequestId]:
    return [one.job.request_id for one in owed]

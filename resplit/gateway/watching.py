"""What an observer of the cluster sees, for many viewers at once: one look a second however many look, one trail."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Self, TypeVar

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from resplit.access import Access
from resplit.control import READERS, explain_on, status_on
from resplit.gateway.picture import Json, event_json, look_json
from resplit.replies import RequestError
from resplit.trail import follow_reader
from schemas import subjects
from schemas.audit import AuditKind
from schemas.control import ExplainReply, StatusReply
from schemas.errors import ResplitError

T = TypeVar("T")

LOOK_S = 1.0
FRESH_S = 0.25
"""However many ask, the orchestrator is asked no more often than this."""
SELDOM_S = 5.0
"""While nobody watches: who comes sees what was before."""
ASK_S = 5.0
KEPT = 300
"""Looks that a new viewer is shown: five minutes."""
EVENTS_KEPT = 500
OFTEN = frozenset({AuditKind.REQUEST_ENDED, AuditKind.REQUEST_REFUSED, AuditKind.CLOUD_ASKED})
"""Kinds that come with every request: at most so many of them a second are shown, and the trail has all."""
OFTEN_MAX = 10
WAITING_MAX = 64
"""What a viewer that does not read may have waiting; it is then shown the whole anew."""

log = logging.getLogger(__name__)


class Watch:
    """Looks at the cluster while somebody watches, and keeps what was seen for who comes later."""

    def __init__(self, at: Access) -> None:
        self._at = at
        self._connection: Nats | None = None
        self._looks: deque[Json] = deque(maxlen=KEPT)
        self._events: deque[Json] = deque(maxlen=EVENTS_KEPT)
        self._viewers: set[asyncio.Queue[tuple[str, Json]]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._last: tuple[float, StatusReply | RequestError] | None = None
        self._asking = asyncio.Lock()
        self._often = (0, 0)
        """A second, and how many events that come often were shown in it."""

    async def __aenter__(self) -> Self:
        """Raises what `Access.connect` raises."""
        self._connection = connection = await self._at.connect("resplit-gateway-watch", *READERS)
        read = await follow_reader(connection, self._at.credentials(*READERS), self._at.keys)

        async def take(message: Msg) -> None:
            with suppress(ResplitError):  # what is no event is no event to anybody
                seen = read(message.data)
                if seen.event.kind not in OFTEN or self._may_tell(time.monotonic()):
                    self._told("event", event_json(seen), self._events)

        await connection.subscribe(subjects.ALL_AUDIT, cb=take)
        self._looking = asyncio.ensure_future(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._connection is not None:
            await self._connection.close()

    async def status(self) -> StatusReply:
        """What the orchestrator sees, `FRESH_S` old at most; raises `RequestError("unreachable")` if none answers."""
        async with self._asking:
            if self._last is None or time.monotonic() - self._last[0] >= FRESH_S:
                found: StatusReply | RequestError
                try:
                    found = await self._asked(lambda connection: status_on(connection, ASK_S))
                except RequestError as error:
                    found = error  # for as long as an answer: who comes meanwhile need not wait for it again
                self._last = (time.monotonic(), found)
            if isinstance(self._last[1], RequestError):
                raise self._last[1]
            return self._last[1]

    async def why(self) -> ExplainReply:
        """The last decision about each deployment; raises as `status`."""
        return await self._asked(lambda connection: explain_on(connection, None, ASK_S))

    def dismiss(self) -> None:
        """Have every viewer leave: the gateway stops."""
        for queue in self._viewers:
            _put(queue, ("over", {}))

    @asynccontextmanager
    async def viewer(self) -> AsyncIterator["Viewer"]:
        """Somebody who watches: first what was seen so far, then what is new."""
        queue: asyncio.Queue[tuple[str, Json]] = asyncio.Queue(WAITING_MAX)
        self._viewers.add(queue)
        try:
            yield Viewer(queue, lambda: (list(self._looks), list(self._events)))
        finally:
            self._viewers.discard(queue)

    def _may_tell(self, now: float) -> bool:
        """Whether one more of what comes with every request is shown in this second."""
        second = int(now)
        self._often = (second, self._often[1] + 1 if self._often[0] == second else 1)
        return self._often[1] <= OFTEN_MAX

    async def _asked(self, ask: Callable[[Nats], Awaitable[T]]) -> T:
        assert self._connection is not None
        try:
            return await ask(self._connection)
        except (ResplitError, NatsError, TimeoutError) as error:
            message = error.message if isinstance(error, ResplitError) else str(error) or type(error).__name__
            raise RequestError("unreachable", f"the orchestrator does not answer: {message}") from error

    async def _look(self) -> None:
        while True:
            try:
                found = look_json(await self.status(), time.time())
            except RequestError as error:
                found = {"at": time.time(), "silence": error.message}
            except Exception as error:
                log.exception("a look at the cluster failed")
                found = {"at": time.time(), "silence": type(error).__name__}
            self._told("look", found, self._looks)
            await asyncio.sleep(LOOK_S if self._viewers else SELDOM_S)

    def _told(self, kind: str, found: Json, kept: deque[Json]) -> None:
        kept.append(found)
        for queue in self._viewers:
            _put(queue, (kind, found))


class Viewer:
    """One who watches."""

    def __init__(
        self, queue: "asyncio.Queue[tuple[str, Json]]", seen: Callable[[], tuple[list[Json], list[Json]]]
    ) -> None:
        self._queue = queue
        self._seen = seen

    async def tellings(self) -> AsyncIterator[tuple[str, Json]]:
        """`past` first, and again after what this viewer was too slow for; then each `look` and each `event`."""
        yield "past", self._past()
        while True:
            kind, found = await self._queue.get()
            if kind == "over":
                return
            yield ("past", self._past()) if kind == "lost" else (kind, found)

    def _past(self) -> Json:
        looks, events = self._seen()
        return {"looks": looks, "events": events}


def _put(queue: "asyncio.Queue[tuple[str, Json]]", told: tuple[str, Json]) -> None:
    if queue.full():
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(("lost", {}))
    queue.put_nowait(told)

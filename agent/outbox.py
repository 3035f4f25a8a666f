"""Replies on their way out, in order; and once more those that an outage of NATS may have swallowed.

Core NATS keeps nothing: what was published as the server went, or comes before a client has subscribed again, is heard
by nobody. So nothing is said for a moment after the connection is back, and then first what was said last.
Clients deliver each token once, whatever is repeated.

Of several servers a client's may go while this node's stays. Whoever is not heard of for a moment may be on the way to
another server, and is gone only if a repetition is not heard either; and a client that was away asks again, and is told
what it may have missed.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any

from nats.aio.client import Client
from pydantic import BaseModel

from agent.replies import ReplyTo
from schemas.base import RequestId
from schemas.request import ErrorReply

SUBSCRIBE_AGAIN_S = 1.1
"""By then a client that tries once a second is back, and heard."""
SAID_LATELY_S = 2.0
"""What was said no longer than this before the server went may not have left it."""
KEPT_S = 10.0
"""What was said to a client whose server hangs is lost until it has noticed that, and is at another."""
AGAIN_S = 1.0
"""Nobody is told the same more often than this."""
KEPT_BYTES_MAX = 16 << 20
LOOK_EVERY_S = 0.1

log = logging.getLogger(__name__)

Said = tuple[ReplyTo, BaseModel, RequestId | None]


class Outbox:
    """Sends replies; `run` does the work."""

    def __init__(self, client: Client, on_gone: Callable[[RequestId], None]) -> None:
        """`on_gone` gets a request whose client does not listen any more."""
        self._client = client
        self._on_gone = on_gone
        self._missed: dict[RequestId, float] = {}
        """Requests whose client was not heard of, and since when."""
        self._told_again: dict[tuple[str, str], float] = {}
        self._repeating: set[asyncio.Task[None]] = set()
        self._waiting: asyncio.Queue[Said] = asyncio.Queue()
        self._lately: deque[tuple[float, int, Said]] = deque()
        """When each was said, and its size."""
        self._lately_bytes = 0
        self._lately_at = Counter[str]()
        """How many of those went to an inbox."""
        self._open = asyncio.Event()
        self._open.set()

    def put(self, reply: ReplyTo, value: BaseModel, request: RequestId | None) -> None:
        """Say this after all that was put before; `request` as in `ReplyTo.send`."""
        self._waiting.put_nowait((reply, value, request))

    def missed(self, request: RequestId) -> None:
        """Nobody heard a reply. That means nothing until clients have had the time to listen; later they are gone."""
        if not self._open.is_set():
            return
        now = time.monotonic()
        if (since := self._missed.get(request)) is None:
            self._missed[request] = now
            last = next((said for _, _, said in reversed(self._lately) if said[2] == request), None)
            self._spawn(self._repeat(request, last))
        elif now - since >= SUBSCRIBE_AGAIN_S:
            self._on_gone(request)

    def say_again(self, inbox: str, request: RequestId) -> bool:
        """Whether something was said lately to who asks the same again; it is then said again. A refusal is
        not: whoever was refused may ask again in earnest."""
        if not inbox or inbox not in self._lately_at:  # as a rule
            return False
        found = [one for _, _, one in self._lately if (one[0].inbox, _about(one)) == (inbox, request)]
        said = list({id(one[1]): one for one in found}.values())  # each once, however often it was said again
        if not said or any(isinstance(value, ErrorReply) and value.refused for _, value, _ in said):
            return False
        now = time.monotonic()
        self._told_again = {key: at for key, at in self._told_again.items() if now - at < AGAIN_S}
        if (inbox, request) not in self._told_again:
            self._told_again[inbox, request] = now
            for one in said:
                self._waiting.put_nowait(one)
        return True

    async def _repeat(self, request: RequestId, said: Said | None) -> None:
        await asyncio.sleep(SUBSCRIBE_AGAIN_S)
        if said is not None:
            self._waiting.put_nowait(said)
            await asyncio.sleep(SUBSCRIBE_AGAIN_S)
        self._missed.pop(request, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._repeating.add(task)
        task.add_done_callback(self._repeating.discard)

    async def run(self) -> None:
        """Send what waits, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            while True:
                said = await self._waiting.get()
                await self._open.wait()
                await self._send(said)

    async def drain(self) -> None:
        """Send all that waits, now."""
        while not self._waiting.empty():
            await self._send(self._waiting.get_nowait())

    async def _send(self, said: Said) -> None:
        reply, value, request = said
        try:
            size = await reply.send(value, request)
        except Exception:  # one client's reply must not keep the others from theirs
            log.exception("a reply could not be sent")
            return
        now = time.monotonic()
        self._lately.append((now, size, said))
        self._lately_bytes += size
        self._lately_at[reply.inbox] += 1
        while self._lately and (self._lately[0][0] < now - KEPT_S or self._lately_bytes > KEPT_BYTES_MAX):
            _, size, (reply, _, _) = self._lately.popleft()
            self._lately_bytes -= size
            self._lately_at[reply.inbox] -= 1
            if not self._lately_at[reply.inbox]:
                del self._lately_at[reply.inbox]

    async def _watch(self) -> None:
        """Keep still while the server is away and until clients are back; then say again what was said last."""
        reconnects = self._client.stats["reconnects"]
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._client.is_connected:
                self._open.clear()
            elif self._client.stats["reconnects"] != reconnects:
                self._open.clear()
                reconnects = self._client.stats["reconnects"]
                await asyncio.sleep(SUBSCRIBE_AGAIN_S)
                if self._client.is_connected:
                    await self._say_again()
            else:
                self._open.set()

    async def _say_again(self) -> None:
        last = self._lately[-1][0] if self._lately else 0.0
        again = [said for at, _, said in self._lately if at >= last - SAID_LATELY_S]
        self._lately.clear()
        self._lately_at.clear()
        self._lately_bytes = 0
        if again:
            log.info("the NATS server was away: saying again what was said last, %d replies", len(again))
        for said in again:
            await self._send(said)


def _about(said: Said) -> str | None:
    """The request that a reply is about; the last one of a request is sent without it, so that nobody is missed."""
    _, value, request = said
    return request or getattr(value, "request_id", None)

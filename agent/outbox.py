"""Replies on their way out, in order; and once more those that an outage of NATS may have swallowed.

Core NATS keeps nothing: what was published as the server went, or comes before a client has subscribed again, is heard
by nobody. So nothing is said for a moment after the connection is back, and then first what was said last.
Clients deliver each token once, whatever is repeated.
"""

import asyncio
import logging
import time
from collections import deque

from nats.aio.client import Client
from pydantic import BaseModel

from agent.replies import ReplyTo
from schemas.base import RequestId

SUBSCRIBE_AGAIN_S = 1.2
"""By then a client that tries once a second is back, and heard."""
SAID_LATELY_S = 2.0
"""What was said no longer than this before the server went may not have left it."""
KEPT_BYTES_MAX = 16 << 20
LOOK_EVERY_S = 0.1

log = logging.getLogger(__name__)

Said = tuple[ReplyTo, BaseModel, RequestId | None]


class Outbox:
    """Sends replies; `run` does the work."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: asyncio.Queue[Said] = asyncio.Queue()
        self._lately: deque[tuple[float, int, Said]] = deque()
        """When each was said, and its size."""
        self._lately_bytes = 0
        self._open = asyncio.Event()
        self._open.set()

    @property
    def is_open(self) -> bool:
        """Whether clients have had the time to listen: if not, it means nothing that nobody does."""
        return self._open.is_set()

    def put(self, reply: ReplyTo, value: BaseModel, request: RequestId | None) -> None:
        """Say this after all that was put before; `request` as in `ReplyTo.send`."""
        self._waiting.put_nowait((reply, value, request))

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
        while self._lately and (self._lately[0][0] < now - SAID_LATELY_S or self._lately_bytes > KEPT_BYTES_MAX):
            self._lately_bytes -= self._lately.popleft()[1]

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
        again = [said for _, _, said in self._lately]
        self._lately.clear()
        self._lately_bytes = 0
        if again:
            log.info("the NATS server was away: saying again what was said last, %d replies", len(again))
        for said in again:
            await self._send(said)

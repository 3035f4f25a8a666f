"""Work for one HTTP request, for as long as its client is there: a body when it is done, or a stream of events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from resplit.gateway.failures import body_of
from resplit.replies import RequestError

T = TypeVar("T")

QUIET_S = 10.0
"""A stream says a comment after so long a silence: proxies close connections on which nothing moves."""
STUCK_LOOKS = 6
"""So many times `QUIET_S` a client may leave unread what fills its connection: then it is taken to be gone."""
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


class ClientGoneError(Exception):
    """The client closed its connection; what it asked for was cancelled."""


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, unless the client leaves before: then it is cancelled, and `ClientGoneError` raised."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def event(plain: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Server-sent events, until they end or the client leaves: then their generator is closed at once.

    An error in the middle is the last event, in OpenAI's words; there is no `[DONE]` after it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        # Compressing proxies and those that gather would hold tokens back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._sent = False
        self._stuck = 0
        """For so many looks in a row the client has not taken what it is being sent."""
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            tasks = [asyncio.ensure_future(work) for work in (self._pump(send), _until_gone(receive), self._keep(send))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if tasks[0].done() and not tasks[0].cancelled():
                tasks[0].result()  # a defect of ours is told like any other

    async def _pump(self, send: Send) -> None:
        try:
            async for data in self._events:
                self._sent = self._sending = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending, self._stuck = False, 0
        except RequestError as error:
            await send({"type": "http.response.body", "body": event(body_of(error, "openai")), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep(self, send: Send) -> None:
        """Say something when nothing else is said; ends where the client does not read."""
        while self._stuck < STUCK_LOOKS:
            self._sent = False
            await asyncio.sleep(QUIET_S)
            self._stuck += self._sending
            if not self._sent and not self._sending:
                await send({"type": "http.response.body", "body": COMMENT, "more_body": True})


async def begun(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same events once the first is there, or after `QUIET_S`: what is refused is refused with a status of its own,
    and who waits longer than that sees that it waits. Raises what `events` raises before its first."""
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=QUIET_S)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    return _rest(first, events)


async def _rest(first: "asyncio.Future[bytes]", events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield await first
        async for data in events:
            yield data
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()


async def _until_gone(receive: Receive) -> None:
    with suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass

"""Asking the cluster on behalf of HTTP clients: several answers to one request, and no more requests than it may have.

What is measured here is measured as a client sees it; what the nodes measured is in the usage of each answer.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from resplit.client import Client
from resplit.gateway.measures import Measures
from resplit.replies import Completion, RequestError, Token, gather

Wire = dict[str, Any]

REQUESTS_MAX = 512
"""Requests of HTTP clients that run or wait at once. A cluster refuses what it cannot take itself; this bounds what a
gateway holds for those that it does."""


class Answering:
    """The client of the bus that every HTTP request goes through."""

    def __init__(self, client: Client, measures: Measures, requests_max: int = REQUESTS_MAX) -> None:
        self._client = client
        self._measures = measures
        self._requests_max = requests_max
        self._running = 0

    @property
    def client(self) -> Client:
        return self._client

    @property
    def running(self) -> int:
        """Requests that run or wait now."""
        return self._running

    @asynccontextmanager
    async def admitted(self, operation: str, deployment: str) -> AsyncIterator["Taken"]:
        """A place among those that run; raises `RequestError("overloaded")` where there is none."""
        taken = Taken(self._measures, operation, deployment)
        try:
            if self._running >= self._requests_max:
                message = f"{self._requests_max} requests run and wait at this gateway; ask again, or run another"
                raise RequestError("overloaded", message)
            self._running += 1
            self._measures.running(+1)
            try:
                yield taken
            finally:
                self._running -= 1
                self._measures.running(-1)
        except BaseException as error:
            taken.ended(error)
            raise
        taken.ended(None)

    async def tokens(self, deployment: str, wires: Sequence[Wire]) -> AsyncGenerator[tuple[int, Token], None]:
        """The tokens of each answer with its number, as they come. The first that fails ends all of them."""
        streams = [self._client.stream(deployment, **wire) for wire in wires]
        try:
            if len(streams) == 1:
                async for token in streams[0]:
                    yield 0, token
                return
            async for number, token in _merged(streams):
                yield number, token
        finally:
            for stream in streams:
                await stream.aclose()

    async def whole(
        self, deployment: str, wires: Sequence[Wire], seen: Callable[[int, Token], None]
    ) -> list[Completion]:
        """Each answer, once all are there; `seen` is told of every token."""
        found: list[list[Token]] = [[] for _ in wires]
        stream = self.tokens(deployment, wires)
        try:
            async for number, token in stream:
                seen(number, token)
                found[number].append(token)
        finally:
            await stream.aclose()
        return [gather(tokens) for tokens in found]


class Taken:
    """One request of an HTTP client, from when it was read."""

    def __init__(self, measures: Measures, operation: str, deployment: str) -> None:
        self._measures = measures
        self._about = (operation, deployment)
        self._began = time.monotonic()
        self._first: float | None = None
        self._last = self._began
        self._tokens = 0

    def token(self, number: int, token: Token) -> None:
        """A token came."""
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last
            self._measures.first_token(*self._about, self._last - self._began)
        self._tokens += 1
        if token.usage is not None:
            self._measures.used(*self._about, token.usage.prompt_tokens, token.usage.completion_tokens)

    def used(self, prompt_tokens: int) -> None:
        """What was read, by what answers in one."""
        self._measures.used(*self._about, prompt_tokens, 0)

    def ended(self, error: BaseException | None) -> None:
        """It is over."""
        code = None if error is None else error.code if isinstance(error, RequestError) else "cancelled"
        if self._first is not None and self._tokens > 1:
            self._measures.pace(*self._about, (self._last - self._first) / (self._tokens - 1))
        self._measures.ended(*self._about, time.monotonic() - self._began, code)


async def _merged(streams: Sequence[AsyncGenerator[Token, None]]) -> AsyncGenerator[tuple[int, Token], None]:
    arrived: asyncio.Queue[tuple[int, Token | BaseException | None]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Token, None]) -> None:
        try:
            async for token in stream:
                arrived.put_nowait((number, token))
        except Exception as error:
            arrived.put_nowait((number, error))
        else:
            arrived.put_nowait((number, None))

    pumps = [asyncio.ensure_future(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        left = len(pumps)
        while left:
            number, found = await arrived.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield number, found
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

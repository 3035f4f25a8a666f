"""How an ingress hears what is asked of a deployment: it gets a share of the requests, and most of them for a while
after another ingress was lost.

The server hands each request to one of those that listen, whichever. A process that hangs goes on getting its share
until the server gives its connection up, and what comes to it has to be asked again. Whoever answers in its place
listens several times over meanwhile, so that little is left to the one that hangs.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from schemas.base import DeploymentName
from schemas.subjects import INGRESS_QUEUE, infer

SHARES = 16
"""Of two ingresses of which one hangs, it then gets every seventeenth request."""
SHARED_ANEW_S = 40.0
"""By then the server has given up the connection of whoever hangs (`bus.natsconf`: two pings in 10 s each)."""

Requested = Callable[[Msg], Awaitable[None]]


class Hearing:
    """The requests for one deployment that come to this ingress."""

    def __init__(self, client: Client, deployment: DeploymentName, requested: Requested) -> None:
        self._client = client
        self._subject = infer(deployment)
        self._requested = requested
        self._shares: list[Subscription] = []
        self._narrowing: asyncio.Task[None] | None = None
        """Ends the while in which most of the requests are to come here."""

    async def open(self) -> None:
        """Get a share of the requests, if there is none yet."""
        wanted = 1 if self._narrowing is None else SHARES
        while len(self._shares) < wanted:
            self._shares.append(await self._client.subscribe(self._subject, INGRESS_QUEUE, cb=self._requested))

    async def one_is_lost(self) -> None:
        """Another ingress, or a node that may have been one: for a while get most of the requests, now or once open."""
        if self._narrowing is not None:
            self._narrowing.cancel()
        self._narrowing = asyncio.create_task(self._narrow())
        if self._shares:
            await self.open()

    async def close(self) -> None:
        """Get no more; what the server has handed over already is still taken."""
        found, self._shares = self._shares, []
        await _drain(found)

    async def drop(self) -> None:
        """Get no more, and nothing of what was handed over."""
        found, self._shares = self._shares, []
        if self._narrowing is not None:
            self._narrowing.cancel()
        for share in found:
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                await share.unsubscribe()

    async def _narrow(self) -> None:
        await asyncio.sleep(SHARED_ANEW_S)
        self._narrowing = None
        extra, self._shares = self._shares[1:], self._shares[:1]
        await _drain(extra)


async def _drain(shares: list[Subscription]) -> None:
    # It may fail where the bus is away, and nobody asks then.
    await asyncio.gather(*(share.drain() for share in shares), return_exceptions=True)  # type: ignore[no-untyped-call]

"""Whether this process stood still, stopped or starved, and what waits until it knows what it missed meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable

HUNG_S = 2.0
"""Without a look for so long, this process stood still: it is looked several times a second."""


class Awake:
    """On the event loop."""

    def __init__(self, now: Callable[[], float], catch_up: Callable[[], Awaitable[None]]) -> None:
        """`catch_up` takes in what was missed."""
        self._now = now
        self._looked_at = now()
        self._catch_up = catch_up
        self._catching_up: asyncio.Task[None] | None = None

    def look(self) -> bool:
        """Whether something was missed that is not taken in yet."""
        stood_still, self._looked_at = self._now() - self._looked_at > HUNG_S, self._now()
        if stood_still:
            self.missed()
        return self._catching_up is not None

    def missed(self) -> None:
        """Something was missed."""
        if self._catching_up is None:
            self._catching_up = asyncio.create_task(self._caught_up())

    async def caught_up(self) -> None:
        """Returns once it is taken in."""
        if self._catching_up is not None:
            await asyncio.shield(self._catching_up)

    async def _caught_up(self) -> None:
        try:
            await self._catch_up()
        finally:
            self._catching_up = None

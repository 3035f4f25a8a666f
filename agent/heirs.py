"""Who answers for the requests of an ingress that is gone: whoever serves the deployment now, and only one of them.

The journal decides (`bus.succession`): a fence on the dead life, then its requests in a life of one's own.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nats.aio.client import Client

from agent.served import Served
from bus.journal import SupersededError
from bus.succession import Life, fence, lives, release
from schemas.base import LifeId, NodeId, RequestId
from schemas.errors import ResplitError
from schemas.journal import LiveRequest

LOOK_EVERY_S = 10.0
"""Also without any news: an ingress may have ended before this one came."""
LOOK_AGAIN_S = (0.0, 0.3, 1.0)
"""After news: what tells of an end and what tells of a beginning come in any order."""

log = logging.getLogger(__name__)


def life_name(node: NodeId, boot: str, number: int) -> LifeId:
    """A life of the ingress in one process of a node."""
    return LifeId(f"{node}-{boot}-{number}")


def process_of(life: LifeId) -> tuple[NodeId, str]:
    """The node and the process that a life was of; of a name made otherwise, no process that ever was."""
    parts = life.rsplit("-", 2)
    return (NodeId(parts[0]), parts[1]) if len(parts) == 3 else (NodeId(life), "")


class Adopts(Protocol):
    """The ingress, as far as it inherits."""

    @property
    def served(self) -> tuple[Served, ...]: ...
    def was_here(self, life: LifeId, /) -> bool: ...
    async def adopt(self, served: Served, requests: Sequence[LiveRequest], taken: set[RequestId], /) -> None: ...


class Heirs:
    """Looks for lives that are over, and takes over what they owe."""

    def __init__(self, client: Client, is_over: Callable[[LifeId], bool], ingress: Adopts) -> None:
        self._client = client
        self._is_over = is_over
        self._ingress = ingress
        self._news = asyncio.Event()
        self._taken: dict[tuple[LifeId, LifeId], set[RequestId]] = {}
        """By our life and the dead one: what was taken over of one that could not be taken over whole. It may have
        ended by the time that the rest is tried again."""

    def look(self) -> None:
        """Something began or ended: see whether there is anything to take over."""
        self._news.set()

    async def run(self) -> None:
        """Look, until cancelled: at once when there is news, and a few times after."""
        while True:
            self._news.clear()
            for pause_s in LOOK_AGAIN_S:
                if await self._news_within(pause_s):
                    break  # the node that is to inherit may only now serve the deployment
                await self._look()
            else:
                await self._news_within(LOOK_EVERY_S)

    async def _news_within(self, pause_s: float) -> bool:
        """Wait for news; False if none came."""
        try:
            async with asyncio.timeout(pause_s):
                return await self._news.wait()
        except TimeoutError:
            return False

    async def _look(self) -> None:
        # All at once: the journal of a home that is cut off answers late, or not at all.
        await asyncio.gather(*(self._looked(served) for served in self._ingress.served))

    async def _looked(self, served: Served) -> None:
        try:
            await self._inherit(served)
        except ResplitError as error:
            log.warning("requests of an ingress that is gone wait: %s: %s", served.name, error.message)
        except Exception:  # whatever one life holds, the agent serves on and looks again
            log.exception("requests of an ingress that is gone wait: %s", served.name)

    async def _inherit(self, served: Served) -> None:
        found = await lives(self._client, served.name)
        fences = {life.life: life.fenced_by for life in found}
        heirs = set(fences.values())
        # One that died while it took over comes first: what it had not taken over yet is then there for its own heir.
        for life in sorted(found, key=lambda life: life.life not in heirs):
            # One that is fenced is over, though its process may live.
            over = life.fenced_by is not None or self._is_over(life.life)
            if over and life.life != served.life and not _is_done(life):
                begun = [other.life for other in found if other.fenced_by == life.life and not _is_done(other)]
                await self._take_over(served, life, goes_on(life.fenced_by, fences), begun)

    async def _take_over(self, served: Served, life: Life, begun_by: LifeId | None, begun: Sequence[LifeId]) -> None:
        """`begun_by` goes on with what was begun of it, if anybody does; `begun` are those of which it had begun."""
        by = life.fenced_by
        over = begun_by is None or self._is_over(begun_by) or self._ingress.was_here(begun_by)
        if begun_by != served.life and (not served.runs.current or not over):
            return  # whoever serves the deployment now begins; and what somebody has begun, nobody else does
        try:
            owed = await fence(self._client, served.name, life.life, served.life, None if by == served.life else by)
        except SupersededError as error:
            log.info("%s: %s", served.name, error.message)
            return
        if owed.requests:
            log.warning("taking over from %s: %s, %d requests", life.life, served.name, len(owed.requests))
        lives_of = (served.life, life.life)
        taken = self._taken.setdefault(lives_of, set())
        await self._ingress.adopt(served, owed.requests, taken)
        for other in begun:  # which may owe the same requests still, and is taken over once they have ended here
            self._taken.setdefault((served.life, other), set()).update(taken)
        await release(self._client, owed)
        self._taken.pop(lives_of, None)


def goes_on(by: LifeId | None, fences: Mapping[LifeId, LifeId | None]) -> LifeId | None:
    """PURE: who goes on with what the life `by` began to take over, given who fenced which life; None if nobody does.

    A life that is fenced stores nothing any more, though its process may not have heard it: what it began is its own
    heir's. Where each of several was fenced by another of them, as after one that hung was taken over from and then
    inherited in turn, none of them goes on.
    """
    seen: set[LifeId] = set()
    while by is not None and by not in seen and fences.get(by) is not None:
        seen.add(by)
        by = fences[by]
    return None if by in seen else by


def _is_done(life: Life) -> bool:
    """Whether nothing but a fence is left of it."""
    return life.fenced_by is not None and life.messages == 1

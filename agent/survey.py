"""Measuring peers that this node sends nothing to, so that the planner knows pairs which do not talk yet.

Each is called on now and then over a link of its own, opened for the purpose: some pings, a probe of the goodput,
and goodbye. Whom to call on next, and how seldom, is decided purely by `profiler.links.next_visit`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from agent.links import Link, connect
from agent.peers import Peers
from bus.identity import Identity
from profiler.links import SAMPLES, VISITS_PER_MINUTE, LinkHistory, Visit, next_visit
from schemas.base import NodeId

LOOK_EVERY_S = 0.5
PING_PAUSE_S = 0.02
PROBES = 3
"""TCP begins slowly on a new connection: the first probe shows less than the rate, and the median is of the others."""
PROBE_LONG_S = 0.1
"""A probe that takes so long has told the rate, and more of them would only be in the way."""
VISIT_MAX_S = 10.0
"""A link so slow that its probes take longer yields its round trip, and fewer rates."""

log = logging.getLogger(__name__)


class Survey:
    """Calls on peers, one at a time."""

    def __init__(
        self, identity: Identity, peers: Peers, in_plan: Callable[[], bool], on_news: Callable[[], None]
    ) -> None:
        """`on_news` is told when a peer was measured for the first time, or is reached again or no more."""
        self._identity = identity
        self._peers = peers
        self._in_plan = in_plan
        self._on_news = on_news
        self._visits: dict[NodeId, Visit] = {}
        self._lately: deque[float] = deque(maxlen=VISITS_PER_MINUTE)

    async def run(self) -> None:
        """Measure whoever is due, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            addresses, down = self._peers.to_visit(), self._peers.down
            of = (self._identity.name, tuple(addresses), down, self._visits, self._lately)
            now = time.monotonic()
            peer = next_visit(*of, now, in_plan=self._in_plan())
            if peer is not None:
                history = await self._visit(peer, addresses[peer])
                is_new, before = peer not in self._visits, self._visits.get(peer, Visit(now))
                self._visits[peer] = before.again(now, answered=history is not None)
                self._lately.append(now)
                self._peers.visited(peer, history)
                if is_new or (peer in down) != (peer in self._peers.down):
                    self._on_news()

    async def _visit(self, peer: NodeId, address: str) -> LinkHistory | None:
        """What a call on `peer` measured, added to what was known; None if it could not be reached."""
        try:
            link = await connect(self._identity, peer, address, _ignore, self._peers.history(peer))
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: what a peer advertises is no address
            log.info("a peer could not be measured: %s: %s", peer, error)
            return None
        answered = link.history.rtts
        try:
            async with asyncio.timeout(VISIT_MAX_S):
                await _measure(link)
        except TimeoutError:
            log.info("a peer was slow to be measured: %s", peer)
        finally:
            link.close()
        return link.history if link.history.rtts != answered else None


async def _measure(link: Link) -> None:
    for _ in range(SAMPLES + 1):
        link.ping()
        await asyncio.sleep(PING_PAUSE_S)
    await link.all_answered()
    for _ in range(PROBES):
        started = time.monotonic()
        link.probe()
        await link.all_answered()
        if time.monotonic() - started > PROBE_LONG_S:
            break


def _ignore(_: Link) -> None:
    """That a call is over is no news."""

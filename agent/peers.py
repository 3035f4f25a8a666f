"""How frames reach other nodes: the direct link where there is one, else the bus; and how well each is reached."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from math import ceil, inf

from nats.errors import Error as NatsError

from agent.busroad import ANSWER_LATEST_S, BusRoad
from agent.links import PING_EVERY_S, Link, connect
from bus.identity import Identity
from profiler.links import EXPIRE_S, LinkHistory
from schemas.base import NodeId
from schemas.capacity import HEARTBEAT_SPARE_S, LinkEstimate
from schemas.frame import Frame
from schemas.framing import pack
from schemas.heartbeat import Presence

RETRY_LINK_S = 2.0
"""After a link could not be opened, the bus is used for this long before the next try."""
WAITING_FRAMES_MAX = 1024
GONE_AFTER_S = 3 * HEARTBEAT_SPARE_S
"""A peer that was not heard for this long is neither measured nor reported."""
BUS_PING_EVERY_S = 5.0
ESTIMATES_MAX = 32
"""Peers in a heartbeat, which every node and the orchestrator hear: with n nodes that is n * n times these 4 KB or
so. Edge faults come first, then open links, then the nearest; a pair is known if either of its nodes reports it."""

log = logging.getLogger(__name__)


class Peers:
    """Sends frames to nodes by name, each peer's in order.

    Losing a link is reported once through `on_change`; that the bus does not reach a node either, the bus says
    (`BusRoad`).
    """

    def __init__(self, identity: Identity, on_change: Callable[[NodeId, bool], None]) -> None:
        self._identity = identity
        self._on_change = on_change
        self._address: dict[NodeId, str | None] = {}
        self._links: dict[NodeId, Link] = {}
        self._waiting: dict[NodeId, deque[list[bytes | memoryview]]] = {}
        self._tasks: dict[NodeId, asyncio.Task[None]] = {}
        self._opening: dict[NodeId, asyncio.Task[Link | None]] = {}
        """Tries to reach again whom no link reaches, while the bus carries what there is."""
        self._no_link_before: dict[NodeId, float] = {}
        self._heard_s: dict[NodeId, float] = {}
        self._histories: dict[NodeId, LinkHistory] = {}
        """What links that are closed again measured."""
        self._down: set[NodeId] = set()
        self._bus_pinged_s: dict[NodeId, float] = {}
        self.bus: BusRoad | None = None

    def learn(self, presence: Presence) -> None:
        """Where a peer says it can be reached; a new address replaces the old link."""
        known = self._address.get(presence.node)
        self._address[presence.node] = presence.link
        self._heard_s[presence.node] = time.monotonic()
        if known != presence.link:
            self._down.discard(presence.node)
        if known != presence.link and (link := self._links.pop(presence.node, None)) is not None:
            link.close()

    def send(self, node: NodeId, frame: Frame) -> None:
        """Send `frame` to `node`; never waits. What cannot leave at once leaves in order once it can."""
        pieces = pack(frame)
        link = self._links.get(node)
        if link is not None and link.is_up and node not in self._tasks:
            link.send(pieces)
            return
        waiting = self._waiting.setdefault(node, deque(maxlen=WAITING_FRAMES_MAX))
        waiting.append(pieces)
        self._flush_soon(node)

    def warm(self, nodes: tuple[NodeId, ...]) -> None:
        """Open links ahead of the first frame."""
        for node in nodes:
            if node not in self._links:
                self._waiting.setdefault(node, deque(maxlen=WAITING_FRAMES_MAX))
                self._flush_soon(node)

    def piece_bytes(self, node: NodeId) -> int:
        """What to send a node at a time where steps are to come through in between."""
        return self.history(node).piece_bytes(time.monotonic())

    def came_over_the_bus(self, node: NodeId) -> None:
        """A frame of `node` did: if that is because the link swallows what it is given, no answer is to go there."""
        link = self._links.get(node)
        if link is not None and link.is_up and link.doubt():
            self._close_if_silent(link)
            asyncio.get_running_loop().call_later(link.doubted_s, self._close_if_silent, link)

    def estimates(self) -> tuple[LinkEstimate, ...]:
        """Every peer heard lately that answered lately, over whichever road; at most `ESTIMATES_MAX`."""
        now = time.monotonic()
        found = [estimate for node in self._present(now) if (estimate := self._estimate(node, now)) is not None]
        found.sort(key=lambda estimate: (estimate.up, estimate.peer not in self._links, estimate.rtt_ms))
        return tuple(found[:ESTIMATES_MAX])

    @property
    def down(self) -> frozenset[NodeId]:
        """Peers whose link was lost or could not be opened, until one is."""
        return frozenset(self._down)

    def to_visit(self) -> dict[NodeId, str]:
        """Addresses of peers heard lately to whom no link is open: whoever wants to know them has to call."""
        now = time.monotonic()
        return {
            node: address
            for node in self._present(now)
            if node not in self._links and node not in self._tasks and (address := self._address[node]) is not None
        }

    def visited(self, node: NodeId, history: LinkHistory | None) -> None:
        """A link was opened to `node` only to measure it, with this result; None if it could not be opened."""
        if history is not None:
            self._histories[node] = history
            self._down.discard(node)
        elif node not in self._links:
            self._down.add(node)

    def history(self, node: NodeId) -> LinkHistory:
        """What was measured over links to `node` until now."""
        link = self._links.get(node)
        return self._histories.get(node, LinkHistory()) if link is None else link.history

    async def ping(self) -> None:
        """Measure every link that is open, and over the bus every peer that has none or does not answer; forever.

        A link that is silent is closed, so that the bus carries what it would swallow. Of the links that want a probe
        of their goodput one gets it each time, so that probes do not come in bursts.
        """
        while True:
            for link in tuple(self._links.values()):
                self._close_if_silent(link)
            links = [link for link in self._links.values() if link.is_up]
            idle = next((link for link in links if link.wants_probe), None)
            for link in links:
                if link is idle:
                    link.probe()
                else:
                    link.ping()
            await self._ping_over_the_bus(time.monotonic())
            await asyncio.sleep(PING_EVERY_S)

    def recheck(self) -> None:
        """Close the links to peers that are members no more, or by another key."""
        for link in [link for link in self._links.values() if not link.is_a_member]:
            log.warning("closed a link: %s is not a member any more", link.peer)
            link.close()

    async def stop(self) -> None:
        """Close every link; their loss is not news any more."""
        for task in (*self._tasks.values(), *self._opening.values()):
            task.cancel()
        links, self._links = tuple(self._links.values()), {}
        for link in links:
            link.close()

    def _present(self, now: float) -> list[NodeId]:
        return [node for node, heard in self._heard_s.items() if now - heard <= GONE_AFTER_S]

    def _estimate(self, node: NodeId, now: float) -> LinkEstimate | None:
        link = self._links.get(node)
        is_down = node in self._down if link is None else link.is_silent or not link.is_up
        history = self.history(node)
        if not is_down and (rtt_ms := history.rtt_ms(now)) is not None:
            # An open link that carries only small frames is not probed: what it last showed is better than nothing.
            expire_s = EXPIRE_S if link is None else inf
            jitter_ms, goodput = history.jitter_ms(now), history.goodput_bytes_per_s(now, expire_s)
            return LinkEstimate(
                peer=node,
                rtt_ms=round(rtt_ms, 4),
                jitter_ms=None if jitter_ms is None else round(jitter_ms, 4),
                goodput_bytes_per_s=None if goodput is None else ceil(goodput),
                direct=True,
            )
        history = LinkHistory() if self.bus is None else self.bus.history(node)
        if (rtt_ms := history.rtt_ms(now, ANSWER_LATEST_S)) is None:
            return None
        jitter_ms = history.jitter_ms(now, ANSWER_LATEST_S)
        return LinkEstimate(
            peer=node,
            rtt_ms=round(rtt_ms, 4),
            jitter_ms=None if jitter_ms is None else round(jitter_ms, 4),
            direct=False,
            up=not is_down,
        )

    async def _ping_over_the_bus(self, now: float) -> None:
        if self.bus is None:
            return
        unlinked = [node for node in self._present(now) if self._needs_the_bus(node)]
        due = [n for n in unlinked if now - self._bus_pinged_s.get(n, float("-inf")) >= BUS_PING_EVERY_S]
        for node in due[:ESTIMATES_MAX]:
            self._bus_pinged_s[node] = now
            with contextlib.suppress(NatsError):  # the bus is away: silence is the right answer
                await self.bus.ping(node)

    def _close_if_silent(self, link: Link) -> None:
        if link.is_up and link.is_silent:
            log.info("a link is silent: %s", link.peer)
            link.close()

    def _needs_the_bus(self, node: NodeId) -> bool:
        link = self._links.get(node)
        return node in self._down or self._address[node] is None or (link is not None and link.is_silent)

    def _flush_soon(self, node: NodeId) -> None:
        if node not in self._tasks:
            self._tasks[node] = asyncio.create_task(self._flush(node))

    async def _flush(self, node: NodeId) -> None:
        try:
            link = await self._link(node)
            waiting = self._waiting[node]
            while waiting:
                if link is not None and link.is_up:
                    link.send(waiting.popleft())
                elif self.bus is not None:
                    pieces = waiting.popleft()
                    try:
                        await self.bus.send(node, pieces)
                    except NatsError as error:  # the step is driven again
                        log.warning("a frame could not leave over the bus: %s: %r", node, error)
        finally:
            del self._tasks[node]
        if self._waiting[node]:
            self._flush_soon(node)

    async def _link(self, node: NodeId) -> Link | None:
        link = self._links.get(node)
        if link is not None and link.is_up:
            return link
        if node not in self._down:
            return await self._open(node)
        if node not in self._opening:  # the bus is there at once; what does not answer takes seconds to say so
            self._opening[node] = opening = asyncio.create_task(self._open(node))
            opening.add_done_callback(lambda _: self._opening.pop(node, None))
        return None

    async def _open(self, node: NodeId) -> Link | None:
        loop = asyncio.get_running_loop()
        address = self._address.get(node)
        if address is None or loop.time() < self._no_link_before.get(node, 0.0):
            return None
        try:
            link = await connect(self._identity, node, address, self._lost, self.history(node))
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: what a peer advertises is no address
            log.info("no direct link to %s: %s", node, error)
            self._no_link_before[node] = loop.time() + RETRY_LINK_S
            self._down.add(node)
            return None
        if (other := self._links.get(node)) is not None and other.is_up:
            link.close()  # its address changed while it was called, and it was called again
            return other
        self._links[node] = link
        self._down.discard(node)
        link.ping()
        self._on_change(node, True)
        return link

    def _lost(self, link: Link) -> None:
        self._histories[link.peer] = link.history
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self._down.add(link.peer)
            # Over the bus: the other end of a link that was cut is told so.
            self._waiting.setdefault(link.peer, deque(maxlen=WAITING_FRAMES_MAX)).append([])
            self._flush_soon(link.peer)
            self._on_change(link.peer, False)

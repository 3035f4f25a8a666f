"""How frames reach other nodes: the direct link where there is one, else the bus."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from nats.errors import Error as NatsError

from agent.busroad import BusRoad
from agent.links import PING_EVERY_S, Link, connect
from bus.keys import Identity
from schemas.base import NodeId
from schemas.capacity import Capacity, LinkEstimate
from schemas.frame import Frame
from schemas.framing import pack

RETRY_LINK_S = 2.0
"""After a link could not be opened, the bus is used for this long before the next try."""
WAITING_FRAMES_MAX = 1024

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
        self._no_link_before: dict[NodeId, float] = {}
        self.bus: BusRoad | None = None

    def learn(self, capacity: Capacity) -> None:
        """Where a peer says it can be reached; a new address replaces the old link."""
        known = self._address.get(capacity.node)
        self._address[capacity.node] = capacity.link
        if known != capacity.link and (link := self._links.pop(capacity.node, None)) is not None:
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

    def estimates(self) -> tuple[LinkEstimate, ...]:
        """The measured round trip of every link that is up."""
        return tuple(
            LinkEstimate(peer=node, rtt_ms=link.rtt_ms, direct=True)
            for node, link in self._links.items()
            if link.is_up and link.rtt_ms is not None
        )

    async def ping(self) -> None:
        """Measure every link, forever."""
        while True:
            for link in self._links.values():
                if link.is_up:
                    link.ping()
            await asyncio.sleep(PING_EVERY_S)

    async def stop(self) -> None:
        """Close every link; their loss is not news any more."""
        for task in tuple(self._tasks.values()):
            task.cancel()
        links, self._links = tuple(self._links.values()), {}
        for link in links:
            link.close()

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
        loop = asyncio.get_running_loop()
        address = self._address.get(node)
        if address is None or loop.time() < self._no_link_before.get(node, 0.0):
            return None
        try:
            link = await connect(self._identity, node, address, self._lost)
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: what a peer advertises is no address
            log.info("no direct link to %s: %s", node, error)
            self._no_link_before[node] = loop.time() + RETRY_LINK_S
            return None
        self._links[node] = link
        link.ping()
        self._on_change(node, True)
        return link

    def _lost(self, link: Link) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self._on_change(link.peer, False)

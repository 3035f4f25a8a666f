"""Direct links between agents: mutually authenticated TLS 1.3 over TCP, frames one after the other.

Each agent keeps one connection to each peer it sends to, and receives on those its peers opened. On the
wire: a length (uint32, little-endian), one byte of type, the body. Frames keep their order.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import statistics
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import cast

from bus.keys import Identity, peer_name
from schemas.base import NodeId
from schemas.framing import MAX_FRAME_BYTES

CONNECT_TIMEOUT_S = 3.0
PING_EVERY_S = 1.0
READ_BYTES = 1 << 18
RTT_SAMPLES = 9
"""The estimate is the median of as many: the first ping, in the wake of the handshake, says nothing."""

log = logging.getLogger(__name__)

Receive = Callable[[NodeId, memoryview], None]


class Kind(IntEnum):
    """The byte after the length."""

    FRAME = 0
    PING = 1
    PONG = 2


class LinkServer:
    """Accepts links and hands each frame, with the name its peer's certificate proved, to `receive`."""

    def __init__(self, identity: Identity, receive: Receive, on_lost: Callable[[NodeId], None]) -> None:
        """`on_lost` hears whose link has ended."""
        self._tls = identity.tls(ssl.Purpose.CLIENT_AUTH)
        self._known = identity.nodes
        self._receive = receive
        self._on_lost = on_lost
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Transport] = set()

    async def start(self, listen: str) -> tuple[str, int]:
        """Listen on `host:port` (port 0 picks one); returns the address."""
        host, _, port = listen.rpartition(":")
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, host, int(port), ssl=self._tls)
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound

    async def stop(self) -> None:
        """Close the listener and every accepted link."""
        if self._server is not None:
            self._server.close()
            for transport in tuple(self._open):
                transport.abort()

    def _protocol(self) -> "_Framed":
        return _Framed(self._accepted, self._incoming, self._ended)

    def _accepted(self, link: "_Framed") -> bool:
        name = link.peer
        if name is None or NodeId(name) not in self._known:
            log.warning("refused a link from a peer that is not of this cluster: %s", name)
            return False
        self._open.add(link.transport)
        return True

    def _ended(self, link: "_Framed") -> None:
        if link.transport in self._open:
            self._open.discard(link.transport)
            self._on_lost(NodeId(link.peer or ""))

    def _incoming(self, link: "_Framed", kind: int, body: memoryview) -> None:
        if kind == Kind.FRAME:
            self._receive(NodeId(link.peer or ""), body)
        elif kind == Kind.PING:
            link.write(Kind.PONG, [body])


class Link:
    """An outgoing link to one peer."""

    def __init__(self, peer: NodeId, framed: "_Framed") -> None:
        self.peer = peer
        self._rtts_ms: deque[float] = deque(maxlen=RTT_SAMPLES)
        self._framed = framed

    @property
    def rtt_ms(self) -> float | None:
        """The round trip as lately measured; None before the second ping came back."""
        return statistics.median(self._rtts_ms) if len(self._rtts_ms) > 1 else None

    @property
    def is_up(self) -> bool:
        return not self._framed.transport.is_closing()

    def send(self, pieces: list[bytes | memoryview]) -> None:
        """Queue one frame for writing; the caller has seen `is_up`."""
        self._framed.write(Kind.FRAME, pieces)

    def ping(self) -> None:
        """Measure the round trip; `rtt_ms` follows when the answer comes."""
        self._framed.write(Kind.PING, [time.monotonic_ns().to_bytes(8, "little")])

    def close(self) -> None:
        """Drop the connection."""
        self._framed.transport.abort()

    def answered(self, body: memoryview) -> None:
        """A PONG came back with the PING's own bytes."""
        if len(body) != 8:
            return
        self._rtts_ms.append((time.monotonic_ns() - int.from_bytes(body, "little")) / 1e6)


async def connect(identity: Identity, peer: NodeId, address: str, on_lost: Callable[[Link], None]) -> Link:
    """Open a link to `peer` at `host:port`; raises OSError or TimeoutError, and OSError if it is somebody else."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    links: list[Link] = []

    def incoming(_: _Framed, kind: int, body: memoryview) -> None:
        if kind == Kind.PONG and links:
            links[0].answered(body)

    def lost(_: _Framed) -> None:
        if links:
            on_lost(links[0])

    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        tls = identity.tls(ssl.Purpose.SERVER_AUTH)
        _, framed = await loop.create_connection(
            lambda: _Framed(lambda link: link.peer == peer, incoming, lost),
            host,
            int(port),
            ssl=tls,
            server_hostname=peer,
        )
    if framed.peer != peer:
        raise OSError(f"{address} is {framed.peer}, not {peer}")
    link = Link(peer, framed)
    links.append(link)
    return link


class _Framed(asyncio.Protocol):
    """Length-prefixed messages over a transport; drops a peer that announces more than a frame may hold."""

    transport: asyncio.Transport
    peer: str | None = None

    def __init__(
        self,
        accept: Callable[["_Framed"], bool],
        incoming: Callable[["_Framed", int, memoryview], None],
        lost: Callable[["_Framed"], None],
    ) -> None:
        self._accept = accept
        self._incoming = incoming
        self._lost = lost
        self._buffer = bytearray()
        self._needed = 5

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.peer = peer_name(transport.get_extra_info("peercert"))
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
        if not self._accept(self):
            self.transport.abort()

    def write(self, kind: Kind, pieces: list[bytes | memoryview]) -> None:
        size = sum(len(piece) for piece in pieces)
        head = size.to_bytes(4, "little") + bytes((kind,))
        if size <= READ_BYTES:
            # One write is one TLS record and one system call: for a small frame the copy is cheaper.
            self.transport.write(b"".join((head, *pieces)))
        else:
            self.transport.writelines([head, *pieces])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= self._needed:
            size = int.from_bytes(self._buffer[:4], "little")
            if size > MAX_FRAME_BYTES:
                log.warning("dropped a link whose peer announced a frame too large: %s, %d bytes", self.peer, size)
                self.transport.abort()
                return
            self._needed = 5 + size
            if len(self._buffer) < self._needed:
                return
            message, self._buffer = self._buffer, self._buffer[self._needed :]
            kind, body = message[4], memoryview(message)[5 : self._needed]
            self._needed = 5
            self._incoming(self, kind, body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(self)

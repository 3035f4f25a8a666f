"""Direct links between agents: mutually authenticated TLS 1.3 over TCP, frames one after the other.

Each agent keeps one connection to each peer it sends to, and receives on those its peers opened. On the
wire: a length (uint32, little-endian), one byte of type, the body. Frames keep their order.

A ping right behind a large message is answered once all of that has arrived: so every large frame measures the
link's goodput, and where there are none, now and then a probe that carries nothing does.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
import time
from collections.abc import Callable
from enum import IntEnum
from typing import cast

from bus.identity import Identity
from profiler.links import TRANSFER_BYTES, LinkHistory
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.framing import MAX_FRAME_BYTES

CONNECT_TIMEOUT_S = 3.0
PING_EVERY_S = 1.0
READ_BYTES = 1 << 18
PROBE_BYTES = 256 << 10
"""Enough for a rate, and little enough not to be felt: 2 ms on gigabit Ethernet."""
PROBE_EVERY_S = 60.0
IDLE_S = 5.0
"""A link that carried no frame for this long may be probed: a frame never waits behind a probe while tokens flow."""
PINGS_MAX = 64
"""Pings whose answers are outstanding; a peer that answers none is sent no more."""
SLOWEST_BYTES_PER_S = 1e6 / 8
"""What a link whose rate is unknown is trusted to carry; one whose rate is known, a quarter of that."""
SILENT_AFTER_S = 2.0
"""A ping unanswered for this long means that the link is not to be counted on. The kernel takes 5 s to say so, and by
then every step under way has been given up."""
DOUBTED_AFTER_S = 0.5
"""The same beside two round trips, where the peer itself goes round the link."""
FORSAKEN_AFTER_S = 10
"""Whose peer pings every second and has not for so long, of that link the kernel asks whether anybody still has it."""
TCP_INFO_BYTES, UNACKED_AT, ACKED_MS_AT = 104, 24, 56
"""Of Linux' `struct tcp_info`: segments that are not acknowledged, and milliseconds since the last acknowledgement."""

log = logging.getLogger(__name__)

Receive = Callable[[NodeId, memoryview], None]


class Kind(IntEnum):
    """The byte after the length."""

    FRAME = 0
    PING = 1
    PONG = 2
    PROBE = 3


class LinkServer:
    """Accepts links and hands each frame, with the name its peer's certificate proved, to `receive`."""

    def __init__(self, identity: Identity, receive: Receive, on_lost: Callable[[NodeId], None]) -> None:
        """`on_lost` hears whose link has ended."""
        self._identity = identity
        self._receive = receive
        self._on_lost = on_lost
        self._server: asyncio.Server | None = None
        self._open: set[_Framed] = set()

    async def start(self, listen: str) -> tuple[str, int]:
        """Listen on `host:port` (port 0 picks one); returns the address.

        Raises `ResplitError(INVALID_REQUEST)` where that cannot be.
        """
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) >= 1 << 16:
            message = f"{listen!r} is no host:port; give an address of this machine, as 10.0.0.11:7410"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "listen")
        loop, tls = asyncio.get_running_loop(), self._identity.tls(ssl.Purpose.CLIENT_AUTH)
        try:
            self._server = await loop.create_server(self._protocol, host, int(port), ssl=tls)
        except OSError as error:
            message = f"cannot listen at {listen}: {error}; give an address of this machine and a port that is free"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "listen") from error
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound

    async def stop(self) -> None:
        """Close the listener and every accepted link."""
        if self._server is not None:
            self._server.close()
            for link in tuple(self._open):
                link.transport.abort()

    def recheck(self) -> None:
        """Close the links of peers that are members no more, or by another key."""
        for link in [link for link in self._open if not link.is_a_member]:
            log.warning("closed a link: %s is not a member any more", link.peer)
            link.transport.abort()

    def _protocol(self) -> "_Framed":
        return _Framed(self._identity, self._accepted, self._incoming, self._ended)

    def _accepted(self, link: "_Framed") -> bool:
        if link.peer is None:
            log.warning("refused a link from a peer that is not a member of this cluster")
            return False
        self._open.add(link)
        return True

    def _ended(self, link: "_Framed") -> None:
        if link in self._open and link.peer is not None:
            self._open.discard(link)
            self._on_lost(link.peer)

    def _incoming(self, link: "_Framed", kind: int, body: memoryview) -> None:
        if kind == Kind.FRAME and link.peer is not None:
            self._receive(link.peer, body)
        elif kind == Kind.PING:
            link.write(Kind.PONG, [body])


class Link:
    """An outgoing link to one peer, and what it measured."""

    def __init__(self, peer: NodeId, framed: "_Framed", history: LinkHistory) -> None:
        self.peer = peer
        self.history = history
        self._framed = framed
        self._outstanding: dict[int, int] = {}
        """Pings by the time in ns that they measure from, oldest first: bytes of the large message right before."""
        self._answers = 0
        self._all_answered = asyncio.Event()
        self._frame_at_s = self._transfer_at_s = float("-inf")
        self._is_doubted = False
        self._doubted_at_s = float("-inf")

    @property
    def is_up(self) -> bool:
        return not self._framed.transport.is_closing()

    @property
    def is_a_member(self) -> bool:
        """Whether the roster still knows the peer by the key that it showed."""
        return self._framed.is_a_member

    @property
    def is_silent(self) -> bool:
        """Whether the oldest ping has waited too long, given what had to arrive before it, and nothing arrives."""
        sent_ns = next(iter(self._outstanding), None)
        if sent_ns is None:
            return False
        if self._framed.is_moving:
            return False
        waited_s = (time.monotonic_ns() - sent_ns) / 1e9
        rate = self.history.goodput_bytes_per_s(sent_ns / 1e9)
        slowest = SLOWEST_BYTES_PER_S if rate is None else rate / 4
        patience_s = self.doubted_s if self._is_doubted else SILENT_AFTER_S
        return waited_s > patience_s + self._outstanding[sent_ns] / slowest

    @property
    def doubted_s(self) -> float:
        """How long a ping may be unanswered while the link is in doubt."""
        rtt_ms = self.history.rtt_ms(time.monotonic())
        return min(SILENT_AFTER_S, DOUBTED_AFTER_S + 2e-3 * (rtt_ms or 0.0))

    @property
    def wants_probe(self) -> bool:
        """Whether nobody uses the link, and its goodput was not measured lately."""
        now = time.monotonic()
        is_idle = now - self._frame_at_s > IDLE_S and not self._outstanding
        return is_idle and now - self._transfer_at_s > PROBE_EVERY_S and bool(self.history.rtts)

    def send(self, pieces: list[bytes | memoryview]) -> None:
        """Queue one frame for writing; the caller has seen `is_up`."""
        started_ns = time.monotonic_ns()
        size = self._framed.write(Kind.FRAME, pieces)
        self._frame_at_s = started_ns / 1e9
        if size >= TRANSFER_BYTES:
            self._transfer_at_s = self._frame_at_s
            self._ping(started_ns, size)

    def ping(self) -> None:
        """Measure the round trip; `history` has it when the answer comes. Not while a large message is under way,
        which the answer would wait for."""
        if not any(self._outstanding.values()):
            self._ping(time.monotonic_ns(), 0)

    def doubt(self) -> bool:
        """The peer sent something over another road, as who gave the link up does, or who has none of its own: be less
        patient until a ping is answered. False if it was doubted just now."""
        now = time.monotonic()
        if now - self._doubted_at_s < PING_EVERY_S:
            return False
        self._is_doubted, self._doubted_at_s = True, now
        self.ping()
        return True

    def probe(self) -> None:
        """Measure the goodput with a message that carries nothing; `history` has it when the answer comes."""
        started_ns = time.monotonic_ns()
        self._ping(started_ns, self._framed.write(Kind.PROBE, [bytes(PROBE_BYTES)]))
        self._transfer_at_s = started_ns / 1e9

    async def all_answered(self) -> None:
        """Wait until every ping was answered or the connection is over; the caller sets the limit."""
        while self._outstanding:
            self._all_answered.clear()
            await self._all_answered.wait()

    def close(self) -> None:
        """Drop the connection."""
        self._framed.transport.abort()

    def answered(self, body: memoryview) -> None:
        """A PONG came back with the PING's own bytes; any other is ignored."""
        sent_ns = int.from_bytes(body[:8], "little")
        size = self._outstanding.pop(sent_ns, None)
        if size is None:
            return
        self._is_doubted = False
        sent_s, now_s = sent_ns / 1e9, time.monotonic_ns() / 1e9
        if size:
            self.history = self.history.transfer(size, sent_s, now_s)
        elif self._answers:  # the first round trip, in the wake of the handshake, says nothing
            self.history = self.history.round_trip(sent_s, now_s)
        self._answers += 1
        if not self._outstanding:
            self._all_answered.set()

    def ended(self) -> None:
        """The connection is over: nothing more will be answered."""
        self._outstanding.clear()
        self._all_answered.set()

    def _ping(self, started_ns: int, size_ahead: int) -> None:
        if len(self._outstanding) < PINGS_MAX:
            self._outstanding[started_ns] = size_ahead
            self._framed.write(Kind.PING, [started_ns.to_bytes(8, "little")])


async def connect(
    identity: Identity,
    peer: NodeId,
    address: str,
    on_lost: Callable[[Link], None],
    history: LinkHistory = LinkHistory(),  # noqa: B008 (a frozen value)
) -> Link:
    """Open a link to `peer` at `host:port`; raises OSError or TimeoutError, and OSError if it is somebody else.

    `history` is what earlier links to it measured.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    links: list[Link] = []

    def incoming(_: _Framed, kind: int, body: memoryview) -> None:
        if kind == Kind.PONG and links:
            links[0].answered(body)

    def lost(_: _Framed) -> None:
        if links:
            links[0].ended()
            on_lost(links[0])

    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        tls = identity.tls(ssl.Purpose.SERVER_AUTH)
        _, framed = await loop.create_connection(
            lambda: _Framed(identity, lambda link: link.peer == peer, incoming, lost),
            host,
            int(port),
            ssl=tls,
            server_hostname=peer,
        )
    if framed.peer != peer:
        raise OSError(f"{address} is {framed.peer}, not {peer}")
    link = Link(peer, framed, history)
    links.append(link)
    return link


class _Framed(asyncio.Protocol):
    """Length-prefixed messages over a transport; drops a peer that announces more than a frame may hold."""

    transport: asyncio.Transport
    peer: NodeId | None = None
    """Who the certificate proved it to be when it was opened."""

    def __init__(
        self,
        identity: Identity,
        accept: Callable[["_Framed"], bool],
        incoming: Callable[["_Framed", int, memoryview], None],
        lost: Callable[["_Framed"], None],
    ) -> None:
        self._identity = identity
        self._accept = accept
        self._incoming = incoming
        self._lost = lost
        self._buffer = bytearray()
        self._needed = 5

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        shown = transport.get_extra_info("ssl_object")
        self._certificate: bytes | None = None if shown is None else shown.getpeercert(binary_form=True)
        self.peer = self._identity.peer(self._certificate)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
                # Who listens sends nothing by itself, and a peer that gave a link up in a black hole could not say so.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, FORSAKEN_AFTER_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, FORSAKEN_AFTER_S)
        if not self._accept(self):
            self.transport.abort()

    @property
    def is_a_member(self) -> bool:
        """Whether the roster still knows the peer by the key that it showed."""
        return self.peer is not None and self._identity.peer(self._certificate) == self.peer

    @property
    def is_moving(self) -> bool:
        """Whether something is still on its way and the other kernel acknowledges some of it: such a link is slow, and
        its pings wait behind the rest."""
        sock = self.transport.get_extra_info("socket")
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            unacked, acked_ms = (struct.unpack_from("=I", info, at)[0] for at in (UNACKED_AT, ACKED_MS_AT))
        except (AttributeError, OSError, struct.error):  # another kernel, or no socket any more
            return False
        return bool(unacked > 0 and acked_ms < 1e3 * SILENT_AFTER_S)

    def write(self, kind: Kind, pieces: list[bytes | memoryview]) -> int:
        """Queue one message; returns the bytes of its body."""
        size = sum(len(piece) for piece in pieces)
        head = size.to_bytes(4, "little") + bytes((kind,))
        if size <= READ_BYTES:
            # One write is one TLS record and one system call: for a small frame the copy is cheaper.
            self.transport.write(b"".join((head, *pieces)))
        else:
            self.transport.writelines([head, *pieces])
        return size

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

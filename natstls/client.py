"""nats-py's client with its traps defused: everybody who connects to NATS does so with this one.

- Over TLS it speaks TLS from the first byte (`tls_handshake_first`). Of its own, nats-py puts TLS over a connection
  that it reads already: a server that says something first is never understood, the end is logged as a mistake, leaving
  a server that hangs takes half a minute, and leaving one that was not believed takes for ever.
- A link that swallows what is sent is given up, whatever the kernel and nats-py do: nats-py waits without end for a
  closed connection to be rid of what it could not send (nats.py issue 671), sends no ping while its flusher is stuck,
  and goes on without whoever reads if that task fails.
- What the server denies is raised where an answer is waited for; nats-py tells its error callback, and nobody else.
- What waits here is bounded, and what is over is an error: unsent, or come and not yet handled.
- Nobody waits longer than `ANSWER_S` for one answer of JetStream, unless told to: what is asked while a server dies is
  never answered, and has to be asked again.
- After a loss, attempts come at random moments, and go to every server before one is tried twice. A server that loses
  sight of most others, which a cut between them does, is left for another: nothing is stored there any more.
"""

import asyncio
import logging
import random
import re
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import ParseResult

from nats.aio.client import Client, Server
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.errors import OutboundBufferLimitError, SlowConsumerError, StaleConnectionError
from nats.js import JetStreamContext

from natstls.patience import Backoff, Seen, Watch, backoff_s, fault, watched

GOODBYE_S = 1.0
"""How long the other side may take to say goodbye; asyncio's own 30 s would pass before the first attempt to reconnect
to a server that hangs, and what a dead link has not carried would be waited for without end."""
USER_TIMEOUT_MS = 5000
"""A black-holed link with unsent data never errors by itself; where the kernel can say so, it is to."""
PING_S, PINGS_MAX = 2, 2
TICK_S = 0.5
ANSWER_S = 2.0
"""For one answer of JetStream, which takes milliseconds; a cluster of servers that elects a leader takes seconds, and
forgets who asked meanwhile."""
FLUSH_S = 2.0
"""A publish waits this long for room."""
UNSENT_BYTES_MAX = 16 << 20
"""While no server takes it; more is refused."""
PENDING_BYTES_MAX = 64 << 20
"""What one subscription may have waiting: a prefill of a large model is tens of megabytes of frames."""
PENDING_MESSAGES_MAX = 1 << 18
PATIENT = Backoff(1.0, 1.0)
"""A client tries once a second at most, and every half a second at least."""
SPREAD_S = 0.2
"""Over so long come those whose server went, where there are others."""
SAYINGS_MAX = 100
"""Different ones that are logged: subjects of inboxes never repeat."""
PERMISSIONS = re.compile(r'permissions violation for (publish|subscription).*? (?:to|of) "(.*?)"', re.IGNORECASE)

log = logging.getLogger(__name__)

Notify = Callable[[], Awaitable[None]]
Denied = Callable[["DeniedError"], None]


class DeniedError(NatsError):
    """The server does not let this login publish to a subject, or hear it; `subject` in lower case, by nats-py."""

    def __init__(self, verb: str, subject: str) -> None:
        super().__init__(f"the NATS server denies this login to {verb} {subject!r}")
        self.verb, self.subject = verb, subject


class UnsentError(OutboundBufferLimitError):
    """So much waits for a server already that no more is taken."""

    def __init__(self, waiting: int) -> None:
        super().__init__(waiting)
        self.waiting = waiting

    def __str__(self) -> str:
        return f"{self.waiting} bytes wait to be sent to a NATS server that does not take them"


class SafeClient(Client):
    """A connection that outlives restarts of servers. `troubles` counts what became of it, by kind: connections `lost`,
    of those the ones that `hung`, messages `denied` by the server, `dropped` unhandled, and refused `unsent`."""

    def __init__(self) -> None:
        super().__init__()
        self.troubles: Counter[str] = Counter(lost=0, hung=0, denied=0, dropped=0, unsent=0)
        self._transport = self._wire = _Wire()
        self._backoff = PATIENT
        self._attempts = 0
        self._attempt = 0
        """Since the connection was lost."""
        self._last_server: str | None = None
        self._servers_seen = 0
        """The most that the server has said there are, since it was connected to."""
        self._is_cut_off = False
        self._is_lost = False
        self._awaited: dict[str, set[Denied]] = {}
        """By subject in lower case: who is to be told that it is denied."""
        self.unheard: dict[str, DeniedError] = {}
        """By subject in lower case: subscriptions that the server denied since the connection was made."""
        self._said: set[str] = set()
        self._watching: asyncio.Task[None] | None = None
        self._on_lost: Notify | None = None
        self._on_back: Notify | None = None
        self._on_error: Callable[[Exception], Awaitable[None]] | None = None

    async def connect(  # type: ignore[override]
        self,
        servers: str | list[str],
        *,
        name: str | None = None,
        backoff: Backoff = PATIENT,
        error_cb: Callable[[Exception], Awaitable[None]] | None = None,
        disconnected_cb: Notify | None = None,
        reconnected_cb: Notify | None = None,
        **options: Any,
    ) -> None:
        """Connect to any of `servers`; tries until `error_cb`, which hears of each failure, raises.

        `disconnected_cb` and `reconnected_cb` are called once for each loss and return. All but `backoff` is nats-py's.
        """
        if "reconnect_time_wait" in options:
            wait_s = float(options.pop("reconnect_time_wait"))
            backoff = Backoff(wait_s, wait_s)
        self._backoff = backoff
        self._on_error, self._on_lost, self._on_back = error_cb, disconnected_cb, reconnected_cb
        self._wire.tls_first = bool(options.get("tls_handshake_first"))
        settings: dict[str, Any] = {
            "max_reconnect_attempts": -1,
            "ping_interval": PING_S,
            "max_outstanding_pings": PINGS_MAX,
            "pending_size": UNSENT_BYTES_MAX,
            "flush_timeout": FLUSH_S,
            **options,
            "reconnect_time_wait": backoff_s(32, random.random(), backoff),  # before the first connection
            "reconnect_to_server_handler": self._next_server,
            "disconnected_cb": self._lost,
            "reconnected_cb": self._back,
            "error_cb": self._failed,
        }
        await super().connect(servers, name=name, **settings)
        if self.options["allow_reconnect"]:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Send what can be sent within `GOODBYE_S`, and end the connection for good."""
        if self._watching is not None:
            self._watching.cancel()
        if self.is_connected and self._pending_data_size:
            with suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._flush_pending(force_flush=True)
        if self._pending_data_size:  # nats-py would wait for it without end
            self._pending, self._pending_data_size = [], 0
            self._wire.abort()
        await super().close()

    @property
    def certificate_until(self) -> datetime | None:
        """When the server's certificate ends; None where the connection has none."""
        return self._wire.certificate_until

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """As nats-py's; raises `UnsentError` where too much waits to be sent already."""
        await self._make_room(len(payload))
        if reply and self._resp_sub_prefix is not None:
            prefix = self._resp_sub_prefix.decode()
            future = self._resp_map.get(reply.removeprefix(prefix))
            if future is not None and not future.done():
                subjects = (subject, f"{prefix}*")
                tell = partial(_fail, future)
                self._expect(subjects, tell)
                future.add_done_callback(lambda _: self._forget(subjects, tell))
        await super().publish(subject, payload, reply, headers)

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: Any = None,
        future: Any = None,
        max_msgs: int = 0,
        pending_msgs_limit: int = PENDING_MESSAGES_MAX,
        pending_bytes_limit: int = PENDING_BYTES_MAX,
    ) -> Subscription:
        """As nats-py's; what waits to be handled is bounded, and what comes beyond that is dropped, counted, said."""
        most = min(pending_msgs_limit, PENDING_MESSAGES_MAX), min(pending_bytes_limit, PENDING_BYTES_MAX)
        return await super().subscribe(subject, queue, cb, future, max_msgs, *most)

    def jetstream(self, **options: Any) -> JetStreamContext:
        """As nats-py's, which would wait 5 s for each answer."""
        return super().jetstream(**{"timeout": ANSWER_S, **options})

    @contextmanager
    def when_denied(self, subjects: tuple[str, ...], tell: Denied) -> Iterator[None]:
        """Call `tell` whenever the server denies one of `subjects` meanwhile, be it to say something there or to hear
        it: for who sends something and waits for an answer by other means than `request`."""
        self._expect(subjects, tell)
        try:
            yield
        finally:
            self._forget(subjects, tell)

    def denial(self, verb: str, subject: str) -> DeniedError:
        """The error that tells of it."""
        return DeniedError(verb, subject)

    def overflow(self, waiting: int) -> UnsentError:
        """The error that tells of it."""
        return UnsentError(waiting)

    def say_once(self, text: str) -> None:
        """Log what may come over and over."""
        if text not in self._said and len(self._said) < SAYINGS_MAX:
            self._said.add(text)
            log.warning("%s", text)

    # What is sent.

    async def _make_room(self, size: int) -> None:
        if not self._pending_data_size or self._pending_data_size + size <= self._max_pending_size:
            return
        if self.is_connected:
            await self._flush_pending(force_flush=True)
            if self._pending_data_size + size <= self._max_pending_size:
                return
        self.troubles["unsent"] += 1
        raise self.overflow(self._pending_data_size)

    # What the server refuses.

    def _expect(self, subjects: tuple[str, ...], tell: Denied) -> None:
        for subject in subjects:
            self._awaited.setdefault(subject.lower(), set()).add(tell)

    def _forget(self, subjects: tuple[str, ...], tell: Denied) -> None:
        for subject in subjects:
            told = self._awaited.get(subject.lower(), set())
            told.discard(tell)
            if not told:
                self._awaited.pop(subject.lower(), None)

    async def _process_err(self, err_msg: str) -> None:
        found = PERMISSIONS.search(err_msg)
        if found is None:
            # nats-py closes for good whatever else a server complains about, the end of a login among it.
            error = NatsError(f"nats: {err_msg.strip(chr(39))}")
            await self._failed(error)
            await self._process_op_err(error)
            return
        verb, subject = "publish to" if found[1].lower() == "publish" else "subscribe to", found[2]
        self.troubles["denied"] += 1
        self.say_once(f"the NATS server refuses: {err_msg.strip(chr(39))}")
        self._err = error = self.denial(verb, subject)
        if found[1].lower() != "publish" and len(self.unheard) < SAYINGS_MAX:
            self.unheard[subject] = error
        for tell in tuple(self._awaited.get(subject.lower(), ())):
            tell(error)
        await self._failed(error)

    async def _failed(self, error: Exception) -> None:
        if isinstance(error, SlowConsumerError):
            self.troubles["dropped"] += 1
            self.say_once(f"messages of {error.sub.subject!r} are dropped: too many wait to be handled here")
        if self._on_error is not None:
            await self._on_error(error)

    # How it is lost and found.

    async def _lost(self) -> None:
        if self._is_lost or self.is_closed:  # which nats-py tells like a loss
            return
        self._is_lost = True
        self.troubles["lost"] += 1
        await _called(self._on_lost)

    async def _back(self) -> None:
        self._is_lost = False
        await _called(self._on_back)

    def _next_server(self, servers: list[Server], _: dict[str, Any]) -> tuple[Server, float]:
        """The server to try next and the wait before: each of them in turn, the one that was lost last."""
        servers.sort(key=lambda server: server.uri.netloc == self._last_server)
        rounds, turn = divmod(self._attempt, len(servers))
        self._attempt += 1
        if turn:
            return servers[turn], 0.0
        if not rounds and len(servers) > 1:
            return servers[turn], SPREAD_S * random.random()  # as a rule the others are there
        return servers[turn], backoff_s(rounds, random.random(), self._backoff)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        self._server_info = {**self._server_info, **info}  # which nats-py keeps as it was when it connected
        if (urls := info.get("connect_urls")) is not None:
            self._servers_seen = len(urls) if initial_connection else max(len(urls), self._servers_seen)
            self._is_cut_off = 2 * len(urls) < self._servers_seen
        await super()._process_info(info, initial_connection)

    async def _connect_to_server(self, s: Any) -> None:
        self._attempts += 1
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        pinging = self._ping_interval_task
        await super()._process_connect_init()
        if pinging is not None:
            pinging.cancel()  # nats-py did, and may have swallowed that
        self._attempt = 0
        self.unheard.clear()
        assert self._current_server is not None
        self._last_server = self._current_server.uri.netloc
        self._wire.set_options()

    async def _watch(self) -> None:
        """Look at the connection until it is closed, and make another where it would not be made."""
        loop = asyncio.get_running_loop()
        watch, looked_at = Watch(self._seen()), loop.time()
        while not self.is_closed:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            watch, looked_at = watched(watch, self._seen(), min(now - looked_at, 2 * TICK_S)), now
            why = fault(watch)
            if why is not None and not self.is_closed:
                log.warning("the connection to NATS is given up (%s); trying another", why)
                self.troubles["hung"] += 1
                self._break_off()
                watch = Watch(self._seen())

    def _seen(self) -> Seen:
        return Seen(
            connected=self.is_connected,
            heard=self._wire.heard,
            attempts=self._attempts,
            reading=_runs(self._reading_task),
            trying=_runs(self._reconnection_task),
            cut_off=self._is_cut_off,
        )

    def _break_off(self) -> None:
        self._wire.abort()
        if self._reconnection_task is not None:
            self._reconnection_task.cancel()
        self._err = StaleConnectionError()
        self._status = Client.RECONNECTING
        self._ps.reset()
        self._reconnection_task = asyncio.create_task(self._attempt_reconnect())


class _Wire(TcpTransport):
    """A connection by TCP, with TLS from the first byte or without, that counts what comes and can be left at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tls_first = False
        self.heard = 0
        self._server: ParseResult | None = None

    def __bool__(self) -> bool:
        return True  # nats-py puts one of its own in the place of a transport that is not connected yet

    @property
    def certificate_until(self) -> datetime | None:
        shown = None if self._io_writer is None else self._io_writer.get_extra_info("peercert")
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC) if shown else None

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self._server = uri
        if not self.tls_first:  # else the handshake, which nats-py asks for next, is a part of connecting
            await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        if not self.tls_first:
            await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
            return
        assert self._server is not None, "connect comes first"
        async with asyncio.timeout(connect_timeout):
            self._io_reader, self._io_writer = await asyncio.open_connection(
                self._server.hostname,
                self._server.port,
                limit=buffer_size,
                ssl=ssl_context,
                server_hostname=uri if isinstance(uri, str) else uri.hostname,
                ssl_shutdown_timeout=GOODBYE_S,
            )

    def set_options(self) -> None:
        """For a connection that has just been made."""
        sock = None if self._io_writer is None else self._io_writer.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)

    async def read(self, buffer_size: int) -> bytes:
        data: bytes = await super().read(buffer_size)
        self.heard += len(data)
        return data

    async def wait_closed(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_S):
                await super().wait_closed()  # type: ignore[no-untyped-call]
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """End the connection without a word; what is unsent is lost."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()


def _runs(task: "asyncio.Task[Any] | None") -> bool:
    return task is not None and not task.done()


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


async def _called(notify: Notify | None) -> None:
    if notify is None:
        return
    try:
        await notify()
    except Exception:  # nats-py would try no more
        log.exception("what follows from the state of the connection to NATS failed")

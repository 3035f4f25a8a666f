"""One way to connect to NATS, with the traps of a dead network defused."""

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from bus.credentials import API_OF, Credentials, NatsOptions
from natstls.client import TlsClient
from natstls.faults import explained
from schemas import subjects
from schemas.base import Home

DEFAULT_URL = "nats://127.0.0.1:4222"
PENDING_BYTES_MAX = 64 << 20
"""What one subscription may have waiting: a prefill of a large model is tens of megabytes of frames."""
FLUSHER_BYTES_MAX = 16 << 20
RECONNECT_S = 0.25
"""Before clients, who try once a second: what they ask then finds somebody."""
SETTLE_S = 10.0
USER_TIMEOUT_MS = 5000
"""A black-holed link with unsent data never errors by itself (nats.py issue 671); the kernel must say so."""

NO_LOGIN = re.compile("authorization violation", re.IGNORECASE)
NO_LOGIN_S = 2.0
"""Who is not let in knocks no more often than this: the server writes each time into its log."""
REFUSED = re.compile("authorization violation|permissions violation", re.IGNORECASE)
"""A publish that is denied raises nothing where it was called; this is the only word of it."""
REFUSALS_MAX = 100
"""Different ones that are logged: subjects of inboxes never repeat."""

log = logging.getLogger(__name__)

Notify = Callable[[], Awaitable[None]]


async def connect(
    url: str,
    name: str,
    *,
    credentials: Credentials | None = None,
    on_lost: Notify | None = None,
    on_back: Notify | None = None,
) -> Client:
    """Connect as `name`, trying until a server answers: says once that it is waiting, and once that it is in.

    `url` may be several, with commas between: any of them will do. The connection then outlives any number of server
    restarts. With `credentials` it speaks TLS, logs in with their NKey and has their inboxes; what the server then
    refuses, the login or what is done with it, is logged once each, and so is why it is not believed. Who is not let
    in, not yet or not any more, tries until it is.
    """
    is_up = waiting = False
    said_once: set[str] = set()
    client = Client() if credentials is None else MemberClient(credentials)

    def say_once(text: str) -> None:
        if text not in said_once and len(said_once) < REFUSALS_MAX:
            said_once.add(text)
            log.warning("%s", text)

    async def lost() -> None:
        if client.is_closed:  # which nats-py tells like a loss
            return
        log.warning("the NATS server is gone; trying until it is back")
        if on_lost is not None:
            await on_lost()

    async def back() -> None:
        _set_user_timeout(client)
        log.warning("the NATS server is back")
        if on_back is not None:
            await on_back()

    async def failed(error: Exception) -> None:
        nonlocal waiting
        log.debug("NATS: %r", error)
        said, no_tls = str(error), explained(error)
        if no_tls is not None:
            say_once(f"the NATS server at {url} {no_tls}")
        elif REFUSED.search(said):
            say_once(f"the NATS server refuses: {said}")
        elif not is_up and not waiting:
            waiting = True
            log.warning("no NATS server at %s yet; trying until there is one", url)
        if no_tls is not None or NO_LOGIN.search(said):
            await asyncio.sleep(NO_LOGIN_S)  # nats-py waits for it

    login: NatsOptions | dict[str, Any] = {} if credentials is None else credentials.nats_options
    await client.connect(
        url.split(","),
        name=name,
        max_reconnect_attempts=-1,
        reconnect_time_wait=RECONNECT_S,  # type: ignore[arg-type]  # it is only slept for
        ping_interval=2,
        max_outstanding_pings=2,
        pending_size=FLUSHER_BYTES_MAX,
        disconnected_cb=lost,
        reconnected_cb=back,
        error_cb=failed,
        **login,
    )
    is_up = True
    _set_user_timeout(client)
    if waiting:
        log.warning("connected to %s", url)
    return client


async def settle(client: Client, timeout_s: float = SETTLE_S) -> None:
    """Return once the server has acted on all that was subscribed and published here before. Raises TimeoutError.

    `Client.flush` does not promise that: nats-py sends its PING ahead of what still waits to be written, so for a
    moment the server may tell others that nobody listens. What is said to oneself waits its turn.
    """
    arrived = asyncio.Event()

    async def note(_: Msg) -> None:
        arrived.set()

    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox, cb=note)
    await client.publish(inbox)
    async with asyncio.timeout(timeout_s):
        await arrived.wait()
    await subscription.unsubscribe()


class MemberClient(TlsClient):
    """A connection with a login, which asks JetStream where its account may."""

    def __init__(self, credentials: Credentials) -> None:
        super().__init__()
        self._api_prefix = credentials.api_prefix

    def jetstream(self, **options: Any) -> JetStreamContext:
        return super().jetstream(**{"prefix": self._api_prefix, **options})


def jetstream_at(client: Client, home: Home, **options: Any) -> JetStreamContext:
    """What `home` keeps, as those at the EDGE ask for it; who steers or watches there asks `client.jetstream`."""
    if home is not None:
        options = {"prefix": subjects.at_edge(home, API_OF["EDGE"]), **options}
    return client.jetstream(**options)


def _set_user_timeout(client: Client) -> None:
    transport = getattr(client, "_transport", None)
    writer = getattr(transport, "_io_writer", None)
    sock = writer.get_extra_info("socket") if writer is not None else None
    if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

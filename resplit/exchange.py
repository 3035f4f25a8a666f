"""One exchange over NATS: a connection, a request sent, its replies awaited with a bound on silence."""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, Self, TypeVar

import msgpack
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import BadSubjectError, MaxPayloadError
from nats.errors import Error as NatsError

from natstls.client import DeniedError, SafeClient
from natstls.faults import explained
from resplit.replies import RequestError, read_error

JSON = "application/json"
MSGPACK = "application/msgpack"
CONTENT_TYPE = "Content-Type"
NO_RESPONDERS = "503"

ASK_AGAIN_S = (0.75, 1.0)
"""A request that nobody has accepted by then is asked once more, under its id, and then again after the next
of these, the last one over and over: the ingress that got it may be gone or hang, and the next one to get it need not.
To accept takes milliseconds, as a rule: the request is stored, whoever waits for whatever."""
ASK_AGAIN_MAX = 40
"""A hung ingress keeps its share of requests until the server drops its connection: of two, every second one."""

LOOK_S = 0.5
"""A client that hears nothing looks so often whether its connection is another by now."""

Reply = dict[str, Any]
Argument = TypeVar("Argument")
Result = TypeVar("Result")


async def open_connection(
    url: str, name: str, timeout_s: float, options: Mapping[str, Any], connection: SafeClient | None = None
) -> SafeClient:
    """Connect to the server at `url`, or to any of several with commas between; raises `RequestError("unreachable")` if
    none is there now.

    The connection then outlives restarts of the server. `connection`: one of a kind of its own, not connected yet.
    """
    connection = SafeClient() if connection is None else connection
    was_up = False
    servers = url.split(",")
    untried = len(servers)

    async def failed(error: Exception) -> None:
        # Before the first connection is up, nats-py would report a refused one here and try for ever. Later on,
        # raising would end its attempts to reconnect.
        nonlocal untried
        untried -= 1
        if not was_up and untried <= 0:
            raise error

    try:
        async with asyncio.timeout(timeout_s):
            await connection.connect(servers, name=name, **{"error_cb": failed, **options})
    except (OSError, NatsError, TimeoutError, ValueError) as error:
        with suppress(NatsError, OSError):
            await connection.close()
        if _is_refusal(error):
            text = f"the NATS server at {url} does not let this login in: its file of logins does not name the key"
            raise RequestError("unreachable", text, "keys") from error
        no_tls = explained(error)
        if no_tls is not None:
            raise RequestError("unreachable", f"the NATS server at {url} {no_tls}", "url") from error
        reason = str(error) or type(error).__name__
        hint = "" if "tls" in options else "; one that speaks TLS says nothing to others: give the folder of a member"
        raise RequestError("unreachable", f"no NATS server answers at {url}: {reason}{hint}") from error
    was_up = True
    return connection


def _is_refusal(error: Exception) -> bool:
    return "authorization violation" in str(error).lower()


class Sealed(Protocol):
    """One request as it travels sealed, and what opens its replies."""

    data: bytes
    headers: dict[str, str]
    roster: int
    """The version of the roster that says who may read it."""

    def open(self, data: bytes, content_type: str) -> bytes | None:
        """The reply in a message; None where it is not sealed by who could read the request."""
        ...


class Sealer(Protocol):
    """Seals requests: `resplit.sealing.Sealer` does, by a cluster's roster."""

    async def follow(self, connection: Nats) -> None:
        """Keep up with who may read, over `connection`. Called before each request; costs something the first time, and
        after a reconnection."""
        ...

    async def renew(self, connection: Nats) -> None:
        """Ask who may read, because somebody whom a request reached may not."""
        ...

    def seal(self, deployment: str, request_id: str, data: bytes, content_type: str) -> Sealed:
        """Raises `RequestError` for what cannot be sealed."""
        ...


class Replies:
    """The replies to one request, in order of arrival, with silence and errors turned into `RequestError`.

    Of what comes to a sealed request, what is not sealed by a reader of it counts only if it is an error: a node that
    cannot read the request has to say so in the open.
    """

    def __init__(
        self,
        connection: Nats,
        request_id: str,
        content_type: str,
        idle_timeout_s: float,
        ask: Callable[[], Awaitable[None]],
        sealed: Sealed | None = None,
        seal_anew: Callable[[], Awaitable[Sealed | None]] | None = None,
    ) -> None:
        """`ask` sends the request once more. `seal_anew` sends it sealed by a newer roster
        than the one that `sealed` was sealed by, if there is one."""
        self._sealed = sealed
        self._ask = ask
        self._seal_anew = seal_anew
        self._asked = 1
        self._heard = False
        self._is_taken = False
        """Some ingress has accepted it."""
        self._connection = connection
        self._request_id = request_id
        self._content_type = content_type
        self._idle_timeout_s = idle_timeout_s
        self._arrived: asyncio.Queue[Msg | DeniedError] = asyncio.Queue()  # bounded by what one request may produce
        self._reconnects = connection.stats["reconnects"]
        self._ask_at = math.inf
        """When to ask again of whom nobody was there to hear it."""
        self.is_over = False
        """The cluster has ended the request: there is nothing left to cancel."""

    async def put(self, message: Msg) -> None:
        self._arrived.put_nowait(message)

    def denied(self, error: DeniedError) -> None:
        """The server lets nobody with this login ask, or hear the replies."""
        self._arrived.put_nowait(error)

    def finished(self) -> None:
        self.is_over = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Reply:
        while True:
            reply = await self._next()
            error = read(lambda plain: read_error(plain, self._request_id), reply, self._request_id)
            if error is None:
                self._is_taken = True
                return reply
            if self._asked > 1 and (error.code, error.field) == ("invalid_request", "request_id"):
                continue  # an ingress got it twice, and answers the first
            if self._asked > 1 and self._is_taken and reply.get("refused"):
                continue  # one that hung refuses what another has taken meanwhile
            if error.code == "bad_signature" and not self._is_taken and await self._is_asked_anew():
                continue  # it reached an ingress that the roster here did not name
            self.is_over = True
            raise error

    async def _is_asked_anew(self) -> bool:
        seal_anew, self._seal_anew = self._seal_anew, None  # once: a roster does not change between two requests
        sealed = None if seal_anew is None else await seal_anew()
        if sealed is None:
            return False
        self._sealed = sealed
        return True

    async def _next(self) -> Reply:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                while (reply := self._read(await self._message())) is None:
                    pass
                return reply
        except TimeoutError:
            where = "is connected" if self._connection.is_connected else "is not connected"
            text = f"nothing came for {self._idle_timeout_s:g} s (the client {where})"
            raise RequestError("timeout", text, None, self._request_id) from None

    def _read(self, message: Msg) -> Reply | None:
        """What a message says; None where a stranger to a sealed request says it."""
        headers = message.headers or {}
        if not message.data and headers.get("Status") == NO_RESPONDERS:
            if self._is_taken:  # by one that is not back yet, as this client is
                self._ask_at = time.monotonic() + LOOK_S
                return None
            self.is_over = True
            deployment = "no agent serves a deployment of this name; `resplit status` lists those there are"
            raise RequestError("unknown_deployment", deployment, None, self._request_id)
        content_type = headers.get(CONTENT_TYPE, self._content_type)
        if self._sealed is None:
            return read(_decode, (message.data, content_type), self._request_id)
        opened = self._sealed.open(message.data, content_type)
        if opened is not None:
            return read(_decode, (opened, self._content_type), self._request_id)
        try:
            stranger = _decode((message.data, content_type))
        except (TypeError, ValueError, msgpack.UnpackException):
            return None
        return stranger if "error" in stranger else None

    async def _message(self) -> Msg:
        while not self._heard and self._asked <= ASK_AGAIN_MAX:
            try:
                async with asyncio.timeout(ASK_AGAIN_S[min(self._asked, len(ASK_AGAIN_S)) - 1]):
                    return await self._first()
            except TimeoutError:
                if self._connection.is_connected:  # else it would be sent as often once the server is back
                    self._asked += 1
                    await self._ask()
        return await self._first()

    async def _first(self) -> Msg:
        message: Msg | DeniedError | None = None
        while message is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    message = await self._arrived.get()
            await self._ask_if_away()
        self._heard = True
        if isinstance(message, DeniedError):
            self.is_over = True
            raise RequestError("forbidden", f"{message} (--keys)", "keys", self._request_id) from message
        return message

    async def _ask_if_away(self) -> None:
        """Ask again after a reconnection: where the ingress kept its own connection, what it said meanwhile is lost.
        And once more where nobody was there then."""
        reconnects, is_due = self._connection.stats["reconnects"], time.monotonic() >= self._ask_at
        if (reconnects != self._reconnects or is_due) and self._connection.is_connected:
            self._reconnects, self._ask_at = reconnects, math.inf
            self._asked += 1
            await self._ask()


def read(reader: Callable[[Argument], Result], reply: Argument, request_id: str) -> Result:
    """What `reader` makes of a reply; raises `RequestError("internal")` where it makes no sense of it."""
    try:
        return reader(reply)
    except Exception as error:  # whatever hostile bytes raise, in a decoder or in a reader: one answer.
        reason = f"{type(error).__name__}: {error}"
        raise RequestError("internal", f"a reply that makes no sense ({reason})", None, request_id) from error


def _decode(message: tuple[bytes, str]) -> Reply:
    data, content_type = message
    plain = _unpacked(data) if content_type.startswith(MSGPACK) else json.loads(data)
    if not isinstance(plain, dict):
        raise TypeError("a reply is an object")
    return plain


def _unpacked(data: bytes) -> Any:
    """Passed over first, which takes no memory: msgpack makes room for what a header announces before it follows."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    unpacker.skip()
    return msgpack.unpackb(data)


async def send(sending: Awaitable[Result], request_id: str) -> Result:
    """Await a call to nats-py with its errors turned into `RequestError`."""
    try:
        return await sending
    except MaxPayloadError as error:
        text = "the request is larger than the NATS server lets through (max_payload)"
        raise RequestError("payload_too_large", text, None, request_id) from error
    except BadSubjectError as error:
        text = "no deployment can have this name"
        raise RequestError("unknown_deployment", text, None, request_id) from error
    except (NatsError, OSError) as error:
        raise RequestError("unreachable", f"the request could not be sent: {error}", None, request_id) from error

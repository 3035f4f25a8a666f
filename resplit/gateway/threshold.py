"""What is turned away before anything reads it: bodies that are too large or too slow, and names that are not ours.

A gateway without API keys listens on loopback, where browsers are too: a page from elsewhere whose name was made to
point here (DNS rebinding) would be let in. So there only requests to a name of this machine are.
"""

import asyncio
import json
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resplit.gateway.api_keys import ApiKey, Door
from resplit.gateway.failures import UNAUTHORIZED, body_of, dialect_of, headers_of, status_of
from resplit.gateway.house import KEY
from resplit.replies import RequestError
from schemas.request import MAX_REQUEST_BYTES

BODY_BYTES_MAX = 4 * MAX_REQUEST_BYTES
"""JSON may take more room than what it says takes on the wire; what the wire does not take it refuses itself."""
BODY_S = 60.0
"""Within which a body has to be there."""
OPEN_PATHS = frozenset({"/health", "/v2/health/live", "/v2/health/ready"})
"""That a gateway is there is no secret: who looks after it asks without a key."""
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Threshold:
    """Everything that comes over HTTP passes here first."""

    def __init__(self, app: ASGIApp, door: Door, names: Iterable[str] | None = None) -> None:
        """`names`: hosts that may be asked for, and that pages which ask may be of; None: any."""
        self._app = app
        self._door = door
        self._names = None if names is None else frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope[KEY] = self._checked(
                scope["method"], scope["path"], {name: value.decode("latin-1") for name, value in scope["headers"]}
            )
        except RequestError as error:
            if error.code == UNAUTHORIZED:
                scope["app"].state.house.measures.unauthorized()
            await _refuse(scope, send, error)
            return
        await self._app(scope, _Body(receive).receive, send)

    def _checked(self, method: str, path: str, headers: dict[bytes, str]) -> ApiKey | None:
        """What the request may use; None where it needs no key. Raises `RequestError`."""
        for header, value in ((b"host", headers.get(b"host", "")), (b"origin", headers.get(b"origin"))):
            if self._names is not None and value is not None and _name_in(value) not in self._names:
                message = f"this gateway has no API keys and answers to this machine alone, not to {value[:100]!r}"
                raise RequestError("forbidden", message, header.decode().capitalize())
        key = None if path in OPEN_PATHS else self._door.opened_by(headers.get(b"authorization"))
        length = headers.get(b"content-length", "0")
        if length.isdigit() and int(length) > BODY_BYTES_MAX:
            raise _too_large()
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if path.startswith("/v1/") and method == "POST" and kind != "application/json":
            message = f"the body is {kind or 'of no type'}; send JSON, with Content-Type: application/json"
            raise RequestError("invalid_request", message, "Content-Type")
        return key


def _name_in(value: str) -> str:
    """The host in `host:port`, or in an origin, as `https://host:port`."""
    host = value.rpartition("://")[2].lower()
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


class BodyError(HTTPException):
    """A body that is not read to its end. (Whatever else is raised while a body is read, FastAPI calls malformed.)"""

    def __init__(self, refusal: RequestError) -> None:
        super().__init__(status_of(refusal.code), refusal.message, {"Connection": "close"})
        self.refusal = refusal


class _Body:
    """What comes in, counted and timed until it is all there."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._bytes = 0
        self._whole = False
        self._until = asyncio.get_running_loop().time() + BODY_S

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            text = f"the body was not there within {BODY_S:g} s"
            raise BodyError(RequestError("timeout", text)) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > BODY_BYTES_MAX:
            raise BodyError(_too_large())
        self._whole = not message.get("more_body", False)
        return message


def _too_large() -> RequestError:
    text = f"a body of more than {BODY_BYTES_MAX} bytes; a request is {MAX_REQUEST_BYTES} at most"
    return RequestError("payload_too_large", text)


async def _refuse(scope: Scope, send: Send, error: RequestError) -> None:
    data = json.dumps(body_of(error, dialect_of(scope["path"]))).encode()
    # What of the body is still on its way nobody reads: the connection ends with this.
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
    await send({
        "type": "http.response.start",
        "status": status_of(error.code),
        "headers": [*headers, (b"connection", b"close")],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": data})

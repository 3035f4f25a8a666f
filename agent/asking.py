"""Asks deployments as clients do: a request out over the bus, its one final reply in.

An agent does so for the pipelines that it conducts. Requests ask to be acknowledged: until an ingress has one it is
sent again, under its id, and from then on the journal answers for it, whoever dies.
"""

import asyncio
import contextlib
import secrets
from datetime import UTC, datetime

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from pydantic import ValidationError

from agent.bounces import NO_RESPONDERS
from agent.traces import HEADER as TRACE
from bus.identity import Identity
from bus.sealed_requests import Seal, seal_request
from schemas import subjects
from schemas.base import DeploymentName, RequestId
from schemas.codec import CONTENT_TYPE, MSGPACK, REQUEST_ID, SEALED, decode_plain, encode_as
from schemas.errors import ErrorCode, ResplitError
from schemas.request import (
    AcceptedReply,
    CompletionReply,
    EmbeddingReply,
    ErrorReply,
    Request,
    TensorReply,
)
from schemas.roster import readers_at

ASK_AGAIN_S = (0.5, 1.0)
"""Until some ingress has a request it is sent again after the first of these, then after the other, over and over: the
ingress that got it may be gone or hang, and the next one to get it need not."""
LOOK_S = 2.0
"""Whether the bus was away, after which an answer may be missing."""

Reply = CompletionReply | EmbeddingReply | TensorReply


class Asker:
    """Asks any number of requests at once, over one inbox."""

    def __init__(self, client: Client, identity: Identity) -> None:
        self._client = client
        self._identity = identity
        self._inbox = client.new_inbox()
        self._open: dict[str, asyncio.Queue[Msg]] = {}

    async def start(self) -> None:
        """Listen for replies."""
        await self._client.subscribe(f"{self._inbox}.*", cb=self._arrived)

    async def ask(self, deployment: DeploymentName, request: Request, *, sealed: bool, trace: str = "") -> Reply:
        """The reply to a request, which has an id and asks to be acknowledged. Raises the `ResplitError` that it ends
        in, UNKNOWN_DEPLOYMENT where nobody serves it, and UNREACHABLE while the bus is away.

        It waits for as long as it takes: whoever asks cancels it in time, and the request with it. `trace` is the
        `traceparent` of what it is asked for.
        """
        assert request.request_id is not None, "a request that may be asked twice has an id"
        assert request.acknowledge, "else it would be asked twice without need"
        address = secrets.token_hex(16)  # who is asked something cannot answer what others are asked
        inbox = self._open[address] = asyncio.Queue()
        asked, over = None, False
        try:
            asked = _Asked(self, deployment, request, request.request_id, address, sealed=sealed, trace=trace)
            reply = await asked.answer(inbox)
            over = True
        except ResplitError:
            over = True
            raise
        finally:
            del self._open[address]
            if asked is not None and (not over or asked.times > 1):  # asked twice, it may run where it was asked first
                with contextlib.suppress(NatsError, OSError):
                    await self._client.publish(subjects.cancel(request.request_id), b"")
        return reply

    @property
    def reconnects(self) -> int:
        """How often the bus was away: what was said to this process meanwhile is lost."""
        return int(self._client.stats["reconnects"])

    @property
    def is_connected(self) -> bool:
        """Whether the bus is there."""
        return self._client.is_connected

    async def send(self, deployment: DeploymentName, address: str, data: bytes, headers: dict[str, str]) -> None:
        """Send a request that is answered at `address`; raises UNREACHABLE while the bus is away."""
        try:
            await self._client.publish(subjects.infer(deployment), data, f"{self._inbox}.{address}", headers)
        except MaxPayloadError as error:
            message = f"what {deployment} is to be asked has {len(data)} bytes, more than the server carries"
            raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message) from error
        except (NatsError, OSError) as error:
            raise ResplitError(ErrorCode.UNREACHABLE, f"{deployment} could not be asked: {error!r}") from error

    def seal(self, data: bytes, deployment: DeploymentName, request: RequestId) -> tuple[bytes, Seal]:
        """A request for the trusted agents of the roster."""
        readers = readers_at(self._identity.roster, datetime.now(UTC))
        return seal_request(data, MSGPACK, deployment, request, readers)

    async def _arrived(self, msg: Msg) -> None:
        if (inbox := self._open.get(msg.subject.rsplit(".", 1)[-1])) is not None:
            inbox.put_nowait(msg)


class _Asked:
    """One request on its way."""

    def __init__(
        self,
        asker: Asker,
        deployment: DeploymentName,
        request: Request,
        request_id: RequestId,
        address: str,
        *,
        sealed: bool,
        trace: str,
    ) -> None:
        self._asker = asker
        self._deployment = deployment
        self._address = address
        self._data = encode_as(request, MSGPACK)
        self._headers = {CONTENT_TYPE: MSGPACK}
        self._seal: Seal | None = None
        if sealed:
            self._data, self._seal = asker.seal(self._data, deployment, request_id)
            self._headers = {CONTENT_TYPE: SEALED, REQUEST_ID: request_id}
        if trace:
            self._headers[TRACE] = trace
        self.times = 0
        """It was sent."""
        self._taken = False
        self._reconnects = 0

    async def answer(self, inbox: asyncio.Queue[Msg]) -> Reply:
        await self._ask()
        while True:
            patience_s = LOOK_S if self._taken else ASK_AGAIN_S[min(self.times, len(ASK_AGAIN_S)) - 1]
            try:
                async with asyncio.timeout(patience_s):
                    message = await inbox.get()
            except TimeoutError:
                # Once it is taken, only what was said while the bus was away can be missing.
                if self._asker.is_connected and (not self._taken or self._asker.reconnects != self._reconnects):
                    await self._ask()
                continue
            reply = self._read(message)
            if reply is not None:
                return reply

    async def _ask(self) -> None:
        self.times += 1
        self._reconnects = self._asker.reconnects
        await self._asker.send(self._deployment, self._address, self._data, self._headers)

    def _read(self, message: Msg) -> Reply | None:
        """The reply in a message; None where it is none, or not the last word. Raises what it ends in."""
        headers = message.headers or {}
        if not message.data and headers.get("Status") == NO_RESPONDERS:
            if self._taken:
                return None  # it was sent once more just before an ingress said that it has it
            raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, f"nobody serves {self._deployment} now")
        data, sealed = message.data, headers.get(CONTENT_TYPE) == SEALED
        if self._seal is not None and sealed:
            try:
                data = self._seal.open_reply(data)
            except ResplitError:
                return None  # by nobody who could read the request
        said = reply_in(data, MSGPACK if sealed else headers.get(CONTENT_TYPE, MSGPACK))
        if self._seal is not None and not sealed and not isinstance(said, ErrorReply):
            return None
        if isinstance(said, AcceptedReply):
            self._taken = True
            return None
        return self._final(said)

    def _final(self, said: Reply | ErrorReply) -> Reply | None:
        if not isinstance(said, ErrorReply):
            return said
        is_second = said.error.code is ErrorCode.INVALID_REQUEST and said.error.field == "request_id"
        if self.times > 1 and (is_second or (self._taken and said.refused)):
            return None  # it was asked again while another works on it
        raise ResplitError(said.error.code, said.error.message, said.error.field, said.error.estimate_ms)


KINDS: tuple[tuple[str, type[Reply | ErrorReply | AcceptedReply]], ...] = (
    ("error", ErrorReply),
    ("status", AcceptedReply),
    ("outputs", TensorReply),
    ("data", EmbeddingReply),
    ("token_ids", CompletionReply),
)
"""Each kind of reply, by a field that it alone has."""


def reply_in(data: bytes, content_type: str) -> Reply | ErrorReply | AcceptedReply:
    """One reply of an ingress; raises `ResplitError(INVALID_REQUEST)` for what is none."""
    plain = decode_plain(data, content_type, "reply")
    for field, kind in KINDS:
        if isinstance(plain, dict) and field in plain:
            try:
                return kind.model_validate(plain)
            except ValidationError as error:
                raise ResplitError.from_validation(error, "reply") from error
    raise ResplitError(ErrorCode.INVALID_REQUEST, "a reply that says nothing")

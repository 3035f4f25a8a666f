"""Replies to clients: encoding, sealing, publishing, and noticing a client that has gone."""

import logging
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from pydantic import BaseModel

from agent.bounces import Bounces
from bus.sealed_requests import Asked, Seal
from schemas import subjects
from schemas.base import RequestId
from schemas.codec import CONTENT_TYPE, JSON, MSGPACK, SEALED, encode_as, media_type_of
from schemas.errors import ErrorCode, ResplitError
from schemas.request import ErrorReply

log = logging.getLogger(__name__)


class Replier:
    """Publishes replies so that the server answers when nobody listens any more.

    A reply is published with a return address of this process: NATS itself says "no responders" there when
    the client's inbox has no subscriber left, which is the earliest and cheapest sign of a client that left.
    """

    def __init__(self, client: Client, on_gone: Callable[[RequestId], None]) -> None:
        self._client = client
        self._bounces = Bounces(client, lambda request: on_gone(RequestId(request)))

    async def start(self) -> None:
        """Listen for bounced replies."""
        await self._bounces.start()

    def to(self, msg: Msg) -> "ReplyTo":
        """Where the replies to a request go, in the encoding the request came in."""
        return self.at(msg.reply, (msg.headers or {}).get(CONTENT_TYPE, JSON))

    def at(self, inbox: str, content_type: str) -> "ReplyTo":
        """The same, from what was kept of a request."""
        # Nobody may make an agent speak on the subjects by which agents, orchestrator or server are steered.
        allowed = "" if inbox.startswith((f"{subjects.ROOT}.", "$")) else inbox
        return ReplyTo(self._client, allowed, content_type, self._bounces)


class ReplyTo:
    """One client's inbox."""

    def __init__(self, client: Client, inbox: str, content_type: str, bounces: Bounces) -> None:
        self._client = client
        self.inbox = inbox
        self._bounces = bounces
        self.content_type = content_type
        """Of the request, as it came."""
        self.media_type = media_type_of(content_type)
        # Only names of ours go back: a header may hold bytes that cannot be sent again.
        self._answered_in = MSGPACK if self.media_type == MSGPACK else JSON
        self.seal: Seal | None = None
        """Of every reply; None to a request that came in the open."""

    def to_asker_of(self, asked: Asked) -> "ReplyTo":
        """The same inbox, answered as this request was asked: in its encoding, and sealed if it was."""
        reply = ReplyTo(self._client, self.inbox, self.content_type, self._bounces)
        reply._answered_in = MSGPACK if media_type_of(asked.content_type) == MSGPACK else JSON
        reply.seal = asked.seal
        return reply

    async def send(self, reply: BaseModel, request: RequestId | None) -> int:
        """Publish one reply, and tell its bytes; with a request's id, a vanished client is reported under it."""
        if not self.inbox:
            return 0  # published without an inbox: the client does not want to know
        back = "" if request is None else self._bounces.address(request)
        data = self._written(reply)
        if len(data) > self._client.max_payload:
            message = f"the reply has {len(data)} bytes, the server carries {self._client.max_payload}; ask for less"
            too_large = ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
            named = getattr(reply, "request_id", None)
            data = self._written(ErrorReply(request_id=named, error=too_large.body))
        headers = {CONTENT_TYPE: self._answered_in if self.seal is None else SEALED}
        await self._client.publish(self.inbox, data, reply=back, headers=headers)
        return len(data)

    def _written(self, reply: BaseModel) -> bytes:
        data = encode_as(reply, self._answered_in)
        return data if self.seal is None else self.seal.seal_reply(data)

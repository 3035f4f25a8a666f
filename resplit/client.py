"""The client: ask a deployment, stream its tokens, each once and in order.

This module needs nats-py and msgpack and of Resplit's other packages `natstls` alone, so an application that has a
`schemas` or a `models` of its own is unharmed by it.
"""

import json
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack
from nats.errors import Error as NatsError

from natstls.client import SafeClient
from natstls.contexts import server_context
from resplit.defaults import CONNECT_TIMEOUT_S, DEFAULT_URL, IDLE_TIMEOUT_S
from resplit.exchange import (
    CONTENT_TYPE,
    JSON,
    MSGPACK,
    Replies,
    Reply,
    Result,
    Sealed,
    Sealer,
    open_connection,
    read,
    send,
)
from resplit.order import InOrder
from resplit.replies import (
    Completion,
    Embeddings,
    RequestError,
    Tensor,
    TensorResult,
    Token,
    gather,
    read_embeddings,
    read_tensors,
    read_token,
)

CLOSE_TIMEOUT_S = 2


class Client:
    """A connection to a cluster; any number of requests may run on it at once.

    Example:

        async with Client("nats://127.0.0.1:4222", keys="keys-app") as client:
            answer = await client.complete("adder", "348+1275=", max_tokens=16)
            print(answer.text, answer.usage.ttft_ms)

    Every method raises `RequestError` and nothing else when a request does not end in output: with the
    code the cluster gave, or `unknown_deployment` (nobody serves it), `timeout` (nothing came for
    `idle_timeout_s`), `payload_too_large` or `unreachable`. Once connected, the connection outlives
    restarts of the NATS server. `keys` is the folder of a member that was enrolled as a client: it logs in with that,
    over TLS with the authority in it; `nats_options` are passed to nats-py. `headers` says what goes with each request
    beside it: a `traceparent` (W3C) has the cluster's spans belong to the caller's.

    With a `sealer` every request and its answer are sealed: the bus and its disk see neither. It takes newer rosters
    from the bus while the client is connected, and remembers them in its folder.

        from resplit.sealing import Sealer

        Client("nats://127.0.0.1:4222", keys="./keys", sealer=Sealer("./keys"))
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        keys: str | Path | None = None,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        nats_options: Mapping[str, Any] | None = None,
        sealer: Sealer | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._url = url
        self._idle_timeout_s = idle_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._options = {**({} if keys is None else _login(Path(keys))), **(nats_options or {})}
        self._sealer = sealer
        self._headers = headers
        self._nats: SafeClient | None = None

    async def __aenter__(self) -> Self:
        self._nats = await open_connection(self._url, "resplit-client", self._connect_timeout_s, self._options)
        if self._sealer is not None:
            await self._sealer.follow(self._nats)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection, self._nats = self._nats, None
        if connection is not None:
            with suppress(NatsError, TimeoutError, OSError):
                await connection.flush(CLOSE_TIMEOUT_S)  # the last cancellations are out before the line closes
            await connection.close()

    @property
    def is_connected(self) -> bool:
        """Whether the server can be reached now."""
        return self._nats is not None and self._nats.is_connected

    async def stream(
        self,
        deployment: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Token, None]:
        """The tokens of a completion as they arrive: each index once, in order, whatever the wire repeats.

        Give exactly one of `prompt`, `messages` and `token_ids`; `fields` are those of a text request
        (`max_tokens`, `temperature`, `seed`, `stop`, `deadline_ms`, ...). The last token has
        `finish_reason` and `usage`. Leaving the loop early cancels the request (at once inside
        `contextlib.aclosing`, else when Python drops the generator).

            async for token in client.stream("adder", "348+1275="):
                print(token.text, end="", flush=True)
        """
        body = _text_body(prompt, messages, token_ids, fields)
        body["stream"] = True
        if body.get("temperature"):
            # Should two ingresses answer it, as one of them hung, they say the same.
            body.setdefault("seed", secrets.randbits(63))
        order = InOrder(body["request_id"])
        async with self._ask(deployment, body, JSON) as replies:
            async for reply in replies:
                if reply.get("status") == "accepted":
                    continue
                for token in order.accept(read(read_token, reply, order.request_id)):
                    if token.finish_reason is not None:
                        replies.finished()
                    yield token
                    if token.finish_reason is not None:
                        return

    async def complete(
        self,
        deployment: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        token_ids: Sequence[int] | None = None,
        **fields: Any,
    ) -> Completion:
        """A whole completion, for the fields `stream` takes.

        It is gathered from a stream: so a long answer may take as long as it needs while a node that
        fell silent is noticed within `idle_timeout_s`, and no answer is too long for one message.
        """
        stream = self.stream(deployment, prompt, messages=messages, token_ids=token_ids, **fields)
        return gather([token async for token in stream])

    async def embed(self, deployment: str, texts: str | Sequence[str], **fields: Any) -> Embeddings:
        """One vector for each text, in the order of the texts."""
        body = _identified({**fields, "input": texts if isinstance(texts, str) else list(texts)})
        return await self._ask_once(deployment, body, JSON, read_embeddings)

    async def infer_tensors(
        self,
        deployment: str,
        inputs: Mapping[str, Tensor | tuple[Sequence[int], str, list[Any] | bytes]],
        outputs: Sequence[str] | None = None,
        **fields: Any,
    ) -> TensorResult:
        """One inference of the Open Inference Protocol v2: each input is (shape, datatype, flat list or bytes).

        Bytes are little-endian and row-major and come back as bytes; lists come back as lists.

            result = await client.infer_tensors("cnn", {"image": ([1, 3, 32, 32], "FP32", image.tobytes())})
            result.outputs["classes"].data
        """
        body = _identified(fields)
        body["id"] = body["request_id"]
        body["inputs"] = [_tensor_body(name, given) for name, given in inputs.items()]
        if outputs is not None:
            body["outputs"] = [{"name": name} for name in outputs]
        return await self._ask_once(deployment, body, MSGPACK, read_tensors)

    async def cancel(self, request_id: str) -> None:
        """Ask whoever serves the request to stop; its own caller then sees the error `cancelled`."""
        await self._connection().publish(f"resplit.v1.cancel.{request_id}")

    async def _ask_once(
        self, deployment: str, body: Reply, content_type: str, reader: Callable[[Reply], Result]
    ) -> Result:
        body["acknowledge"] = True  # else nobody could tell slow from lost
        async with self._ask(deployment, body, content_type) as replies:
            async for reply in replies:
                if reply.get("status") == "accepted":
                    continue
                result = read(reader, reply, body["request_id"])
                replies.finished()
                return result
        raise AssertionError("the replies of a request do not end before its output")

    @asynccontextmanager
    async def _ask(self, deployment: str, body: Reply, content_type: str) -> AsyncIterator["Replies"]:
        """Send one request and yield its replies; leaving before the last one cancels the request."""
        connection = self._connection()
        request_id = body["request_id"]
        inbox = connection.new_inbox()
        data = msgpack.packb(body) if content_type == MSGPACK else json.dumps(body).encode()
        headers = {**self._headers(), CONTENT_TYPE: content_type}
        sealer, sealed = self._sealer, None
        if sealer is not None:
            await sealer.follow(connection)
            sealed = sealer.seal(deployment, request_id, data, content_type)
        subject = f"resplit.v1.infer.{deployment}"

        async def ask() -> None:
            sent, said = (data, headers) if sealed is None else (sealed.data, {**headers, **sealed.headers})
            await send(connection.publish(subject, sent, inbox, said), request_id)

        async def seal_anew() -> Sealed | None:
            nonlocal sealed
            if sealer is None or sealed is None:
                return None
            await sealer.renew(connection)
            newer = sealer.seal(deployment, request_id, data, content_type)
            if newer.roster == sealed.roster:
                return None
            sealed = newer
            await ask()
            return sealed

        replies = Replies(connection, request_id, content_type, self._idle_timeout_s, ask, sealed, seal_anew)
        with connection.when_denied((subject, inbox), replies.denied):
            # An inbox of its own for each request: once it is gone the server itself tells the ingress.
            subscription = await send(connection.subscribe(inbox, cb=replies.put), request_id)
            try:
                await ask()
                yield replies
            finally:
                with suppress(NatsError, OSError):  # the connection may be gone; then nobody waits for this either
                    await subscription.unsubscribe()
                    if not replies.is_over:
                        await connection.publish(f"resplit.v1.cancel.{request_id}")

    def _connection(self) -> SafeClient:
        if self._nats is None:
            raise RequestError("unreachable", "the client is not connected; use it inside `async with`")
        return self._nats


def _login(folder: Path) -> dict[str, Any]:
    """What nats-py is told of a member: the seed of its NKey, the inboxes that nobody else may hear, and by what the
    server is known."""
    found = sorted(folder.glob("*.nk"))
    if len(found) != 1:
        text = f"{folder} is not the folder of one member: it holds {len(found)} files NAME.nk"
        raise RequestError("invalid_request", text, "keys")
    name = found[0].stem
    try:
        tls = server_context(folder, name)
    except ValueError as error:
        raise RequestError("invalid_request", str(error), "keys") from error
    login = {"nkeys_seed_str": found[0].read_text(), "inbox_prefix": f"_INBOX.client.{name}"}
    return {**login, "tls": tls, "tls_handshake_first": True}


def _text_body(
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    token_ids: Sequence[int] | None,
    fields: Mapping[str, Any],
) -> Reply:
    body = _identified(fields)
    given = {"prompt": prompt, "messages": messages, "token_ids": token_ids}
    body.update({name: value for name, value in given.items() if value is not None})
    return body


def _identified(fields: Mapping[str, Any]) -> Reply:
    # Chosen here rather than by the ingress, so that a request can be cancelled before any reply came.
    given = {name: value for name, value in fields.items() if value is not None}
    return {"request_id": uuid.uuid4().hex, **given}


def _tensor_body(name: str, given: Tensor | tuple[Sequence[int], str, list[Any] | bytes]) -> Reply:
    shape, datatype, data = (given.shape, given.datatype, given.data) if isinstance(given, Tensor) else given
    form = "raw" if isinstance(data, (bytes, bytearray, memoryview)) else "data"
    value = bytes(data) if form == "raw" else list(data)
    return {"name": name, "shape": list(shape), "datatype": datatype, form: value}

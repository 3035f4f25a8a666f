"""`/v1`: OpenAI's API. A model is a deployment, by its name."""

import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from resplit.gateway.answering import Answering
from resplit.gateway.connections import DONE, EventStream, begun, event, while_there
from resplit.gateway.house import House, house_of, key_of
from resplit.gateway.openai_replies import (
    Head,
    Kind,
    call_body,
    chat_choice,
    chat_delta,
    embeddings_body,
    model_body,
    text_choice,
    text_delta,
    usage_of,
)
from resplit.gateway.openai_requests import ChatRequest, CompletionRequest, EmbeddingsRequest, Generating
from resplit.gateway.tool_calls import Call, CallReader
from resplit.replies import RequestError, Token, Usage
from schemas.base import NAME_PATTERN

routes = APIRouter(prefix="/v1")


@routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The deployments that this key may ask."""
    house = house_of(request)
    return {"object": "list", "data": await _listed(house, request)}


@routes.get("/models/{name}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One deployment."""
    for found in await _listed(house_of(request), request):
        if found["id"] == name:
            return found
    raise _unknown(name)


@routes.post("/chat/completions")
async def chat(request: Request, asked: ChatRequest) -> Response:
    """A chat, whole or as a stream."""
    house = house_of(request)
    _check(request, asked.model)
    head = _head("chat", asked.model)
    wires = [{**wire, **_named(head, number)} for number, wire in enumerate(asked.wires())]
    if asked.stream:
        events = _chat_events(house.answering, head, asked, wires)
        return EventStream(await _begun(request, events), _told(head))
    body = await while_there(request, _chat_whole(house.answering, head, asked, wires))
    return JSONResponse(body, headers=_told(head))


@routes.post("/completions")
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Texts that are continued, whole or as a stream."""
    house = house_of(request)
    _check(request, asked.model)
    head = _head("text", asked.model)
    wires = [{**wire, **_named(head, number)} for number, wire in enumerate(asked.wires())]
    if asked.stream:
        events = _text_events(house.answering, head, asked, wires)
        return EventStream(await _begun(request, events), _told(head))

    async def whole() -> dict[str, Any]:
        async with house.answering.admitted("text_completion", head.model) as taken:
            found = await house.answering.whole(head.model, wires, taken.token)
        return head.whole([text_choice(n, done) for n, done in enumerate(found)], usage_of([d.usage for d in found]))

    return JSONResponse(await while_there(request, whole()), headers=_told(head))


@routes.post("/embeddings")
async def embeddings(request: Request, asked: EmbeddingsRequest) -> Response:
    """Texts as vectors."""
    answering = house_of(request).answering
    _check(request, asked.model)

    async def whole() -> dict[str, Any]:
        async with answering.admitted("embeddings", asked.model) as taken:
            found = await answering.client.embed(asked.model, asked.input, **asked.wire)
            taken.used(found.usage.prompt_tokens)
        return embeddings_body(asked.model, found, asked.encoding_format)

    return JSONResponse(await while_there(request, whole()))


async def _chat_whole(answering: Answering, head: Head, asked: ChatRequest, wires: list[Any]) -> dict[str, Any]:
    async with answering.admitted("chat", head.model) as taken:
        found = await answering.whole(head.model, wires, taken.token)
    choices = []
    for number, done in enumerate(found):
        content: str | None = done.text
        calls: tuple[Call, ...] = ()
        if (reader := _reader(asked, head, number)) is not None:
            first, rest = reader.push(done.text), reader.flush()
            content, calls = (first.text + rest.text) or None, first.calls + rest.calls
        choices.append(chat_choice(number, done, content, calls))
    return head.whole(choices, usage_of([done.usage for done in found]))


async def _chat_events(
    answering: Answering, head: Head, asked: ChatRequest, wires: list[Any]
) -> AsyncGenerator[bytes, None]:
    readers = [_reader(asked, head, number) for number in range(len(wires))]
    told = [False] * len(wires)
    used: list[Usage] = []
    async with answering.admitted("chat", head.model) as taken, aclosing(answering.tokens(head.model, wires)) as tokens:
        async for number, token in tokens:
            taken.token(number, token)
            if not told[number]:
                told[number] = True
                yield event(head.chunk([chat_delta(number, {"role": "assistant", "content": ""})]))
            delta, finish = _delta(readers[number], token)
            if delta or token.logprob is not None:
                yield event(head.chunk([chat_delta(number, delta, None, token)]))
            if finish is not None:
                yield event(head.chunk([chat_delta(number, {}, finish)]))
            if token.usage is not None:
                used.append(token.usage)
    if asked.stream_options.include_usage:
        yield event(head.chunk([], usage_of(used)))
    yield DONE


async def _text_events(
    answering: Answering, head: Head, asked: Generating, wires: list[Any]
) -> AsyncGenerator[bytes, None]:
    offsets = [0] * len(wires)
    used: list[Usage] = []
    async with (
        answering.admitted("text_completion", head.model) as taken,
        aclosing(answering.tokens(head.model, wires)) as tokens,
    ):
        async for number, token in tokens:
            taken.token(number, token)
            if token.text or token.finish_reason is not None or token.logprob is not None:
                yield event(head.chunk([text_delta(number, token, offsets[number])]))
            offsets[number] += len(token.text)
            if token.usage is not None:
                used.append(token.usage)
    if asked.stream_options.include_usage:
        yield event(head.chunk([], usage_of(used)))
    yield DONE


def _delta(reader: CallReader | None, token: Token) -> tuple[dict[str, Any], str | None]:
    """What a token adds to a message, and why it ends there, if it does."""
    if reader is None:
        return ({"content": token.text} if token.text else {}), token.finish_reason
    before = reader.count
    found = reader.push(token.text)
    text, calls, finish = found.text, list(found.calls), token.finish_reason
    if finish is not None:
        rest = reader.flush()
        text, calls = text + rest.text, [*calls, *rest.calls]
        finish = "tool_calls" if reader.count else finish
    delta: dict[str, Any] = {"content": text} if text else {}
    if calls:
        delta["tool_calls"] = [{"index": before + i, **call_body(call)} for i, call in enumerate(calls)]
    return delta, finish


def _reader(asked: ChatRequest, head: Head, number: int) -> CallReader | None:
    if not asked.tools or asked.tool_choice == "none":
        return None
    return CallReader([tool.function.name for tool in asked.tools], f"{head.request[:20]}{number:02}")


async def _begun(request: Request, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    return await while_there(request, begun(events))


async def _listed(house: House, request: Request) -> list[dict[str, Any]]:
    key = key_of(request)
    if house.watch is None:
        return [model_body(name, house.began) for name in key.models or ()]
    reply = await house.watch.status()
    return [
        model_body(found.name, house.began, found.state)
        for found in reply.deployments
        if found.state != "draining"
        and (key.models is None or found.name in key.models)
        and (found.deployment is None or found.deployment.service_of is None)
    ]


def _check(request: Request, name: str) -> None:
    """Whether the key is for this deployment, and whether there may be one of this name."""
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise _unknown(name)
    key_of(request).check(name)


def _unknown(name: str) -> RequestError:
    return RequestError("unknown_deployment", f"there is no deployment {name[:80]!r} here", "model")


def _head(kind: Kind, name: str) -> Head:
    return Head(kind, uuid.uuid4().hex, name, int(time.time()))


def _named(head: Head, number: int) -> dict[str, str]:
    """Under which id the cluster knows an answer: the trail names it so."""
    return {"request_id": head.request if number == 0 else f"{head.request}-{number}"}


def _told(head: Head) -> dict[str, str]:
    return {"X-Request-Id": head.request}

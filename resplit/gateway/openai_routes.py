"""`/v1`: OpenAI's API. A model is a deployment, by its name."""

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from resplit.gateway.answering import Answering
from resplit.gateway.connections import DONE, EventStream, begun, event, while_there
from resplit.gateway.failures import REQUEST_ID
from resplit.gateway.house import House, check_model, house_of, key_of, unknown_model
from resplit.gateway.openai_replies import (
    Head,
    Json,
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
from resplit.gateway.openai_requests import ChatRequest, CompletionRequest, EmbeddingsRequest, Wire
from resplit.gateway.tool_calls import Call, CallReader
from resplit.replies import Token, Usage

A = TypeVar("A", ChatRequest, CompletionRequest)

routes = APIRouter(prefix="/v1")


@routes.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The deployments that this key may ask."""
    house = house_of(request)
    return {"object": "list", "data": await _listed(house, request)}


@routes.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One deployment."""
    for found in await _listed(house_of(request), request):
        if found["id"] == name:
            return found
    raise unknown_model(name)


@routes.post("/chat/completions")
async def chat(request: Request, asked: ChatRequest) -> Response:
    """A chat, whole or as a stream."""
    return await _answered(request, "chat", asked, _chat_events, _chat_whole)


@routes.post("/completions")
async def completions(request: Request, asked: CompletionRequest) -> Response:
    """Texts that are continued, whole or as a stream."""
    return await _answered(request, "text", asked, _text_events, _text_whole)


@routes.post("/embeddings")
async def embeddings(request: Request, asked: EmbeddingsRequest) -> Response:
    """Texts as vectors."""
    answering = house_of(request).answering
    check_model(request, asked.model)

    async def whole() -> dict[str, Any]:
        async with answering.admitted("embeddings", asked.model) as taken:
            found = await answering.client.embed(asked.model, asked.input, **asked.wire)
            taken.used(found.usage.prompt_tokens)
        return embeddings_body(asked.model, found, asked.encoding_format)

    return JSONResponse(await while_there(request, whole()))


async def _answered(
    request: Request,
    kind: Kind,
    asked: A,
    events: Callable[[Answering, Head, A, Sequence[Wire]], AsyncGenerator[bytes, None]],
    whole: Callable[[Answering, Head, A, Sequence[Wire]], Awaitable[Json]],
) -> Response:
    """The answer to a request, in the form that it asks for, unless its client leaves before."""
    check_model(request, asked.model)
    head = Head(kind, uuid.uuid4().hex, asked.model, int(time.time()))
    # Under these ids the cluster and its trail know the answers.
    wires = [
        {**wire, "request_id": head.request if number == 0 else f"{head.request}-{number}"}
        for number, wire in enumerate(asked.wires())
    ]
    answering, told = house_of(request).answering, {REQUEST_ID: head.request}
    if asked.stream:
        return EventStream(await while_there(request, begun(events(answering, head, asked, wires))), told)
    return JSONResponse(await while_there(request, whole(answering, head, asked, wires)), headers=told)


async def _text_whole(answering: Answering, head: Head, asked: CompletionRequest, wires: Sequence[Wire]) -> Json:
    async with answering.admitted("text_completion", head.model) as taken:
        found = await answering.whole(head.model, wires, taken.token)
    return head.whole([text_choice(n, done) for n, done in enumerate(found)], usage_of([done.usage for done in found]))


async def _chat_whole(answering: Answering, head: Head, asked: ChatRequest, wires: Sequence[Wire]) -> Json:
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
    answering: Answering, head: Head, asked: ChatRequest, wires: Sequence[Wire]
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
    answering: Answering, head: Head, asked: CompletionRequest, wires: Sequence[Wire]
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

"""PURE: what came of a request, in the words of OpenAI's API: whole objects, and the chunks of a stream.

`usage.resplit` says what no OpenAI client asks for and every operator does: where it ran, and what took how long.
"""

import base64
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from resplit.gateway.tool_calls import Call
from resplit.replies import Completion, Embeddings, Token, TokenLogprob, Usage

Json = dict[str, Any]
Kind = Literal["chat", "text"]

UNFINISHED = "\ufffd"
PREFIX = {"chat": "chatcmpl-", "text": "cmpl-"}
WHOLE = {"chat": "chat.completion", "text": "text_completion"}
CHUNK = {"chat": "chat.completion.chunk", "text": "text_completion"}


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    kind: Kind
    request: str
    model: str
    created: int
    """Seconds since 1970."""

    @property
    def id(self) -> str:
        return PREFIX[self.kind] + self.request

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        return {**self._common(WHOLE[self.kind]), "choices": list(choices), "usage": usage}

    def chunk(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        return {**self._common(CHUNK[self.kind]), "choices": list(choices), "usage": usage}

    def _common(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def chat_choice(index: int, done: Completion, content: str | None, calls: Sequence[Call]) -> Json:
    """One whole answer of a chat: what the model said, and which functions it calls."""
    message: Json = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["tool_calls"] = [call_body(call) for call in calls]
    logprobs = None
    if done.logprobs is not None:
        rows = zip(done.texts, done.logprobs, done.top_logprobs or ((),) * len(done.texts), strict=True)
        logprobs = {"content": [_scored(text, logprob, top) for text, logprob, top in rows], "refusal": None}
    finish = "tool_calls" if calls else done.finish_reason
    return {"index": index, "message": message, "finish_reason": finish, "logprobs": logprobs}


def text_choice(index: int, done: Completion) -> Json:
    """One whole answer of a completion."""
    logprobs = None
    if done.logprobs is not None:
        ends = [0]
        for text in done.texts[:-1]:
            ends.append(ends[-1] + len(text))
        logprobs = {
            "tokens": list(done.texts),
            "token_logprobs": list(done.logprobs),
            "top_logprobs": [_by_name(top) for top in done.top_logprobs or ()],
            "text_offset": ends,
        }
    return {"index": index, "text": done.text, "finish_reason": done.finish_reason, "logprobs": logprobs}


def chat_delta(index: int, delta: Json, finish: str | None = None, token: Token | None = None) -> Json:
    """What is new of one answer of a chat."""
    scored = token is not None and token.logprob is not None
    logprobs = None
    if scored:
        assert token is not None
        assert token.logprob is not None
        logprobs = {"content": [_scored(token.text, token.logprob, token.top_logprobs or ())], "refusal": None}
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}


def text_delta(index: int, token: Token, offset: int) -> Json:
    """What is new of one answer of a completion, `offset` characters into it."""
    logprobs = None
    if token.logprob is not None:
        logprobs = {
            "tokens": [token.text],
            "token_logprobs": [token.logprob],
            "top_logprobs": [_by_name(token.top_logprobs or ())],
            "text_offset": [offset],
        }
    return {"index": index, "text": token.text, "finish_reason": token.finish_reason, "logprobs": logprobs}


def call_body(call: Call) -> Json:
    """A function call of a message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage_of(used: Sequence[Usage]) -> Json:
    """What the answers of one request cost together. Prompts count once for each answer: each was computed."""
    prompt, completion = sum(one.prompt_tokens for one in used), sum(one.completion_tokens for one in used)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in used)},
        "resplit": [_detail(one) for one in used],
    }


def embeddings_body(model: str, found: Embeddings, encoding: Literal["float", "base64"]) -> Json:
    """Vectors, as lists or as base64 of little-endian 32-bit floats."""
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(vector, encoding)}
            for index, vector in enumerate(found.vectors)
        ],
        "usage": {
            "prompt_tokens": found.usage.prompt_tokens,
            "total_tokens": found.usage.total_tokens,
            "resplit": [_detail(found.usage)],
        },
    }


def model_body(name: str, created: int, state: str | None = None) -> Json:
    """A deployment, as a model is listed."""
    return {"id": name, "object": "model", "created": created, "owned_by": "resplit", "state": state}


def _vector(vector: Sequence[float], encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _scored(text: str, logprob: float, top: Sequence[TokenLogprob]) -> Json:
    others = [{"token": _name(one), "logprob": one.logprob, "bytes": _bytes(one.text)} for one in top]
    return {"token": text, "logprob": logprob, "bytes": _bytes(text), "top_logprobs": others}


def _by_name(top: Sequence[TokenLogprob]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in top:
        name = _name(one)
        found[_number(one) if name in found else name] = one.logprob
    return found


def _name(one: TokenLogprob) -> str:
    """The text of a token; its number where that is a part of a character, or an older agent does not say it."""
    return _number(one) if one.text is None or UNFINISHED in one.text else one.text


def _number(one: TokenLogprob) -> str:
    return f"token_id:{one.token_id}"


def _bytes(text: str | None) -> list[int] | None:
    """The bytes of a token; None where it is a part of a character, of which the wire says none."""
    return None if not text or UNFINISHED in text else list(text.encode())


def _detail(usage: Usage) -> Json:
    found = asdict(usage)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"):
        del found[name]
    return found

"""PURE: requests as clouds want them, and what they answer as replies need it.

OpenAI's completions, chat completions and embeddings, and the Open Inference Protocol v2. A request that asks for what
a cloud has no word for (token probabilities, `top_k`) is not put to it.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from pydantic import ConfigDict, Field, ValidationError

from agent.clouds import Protocol
from agent.generation import Generation
from agent.intake import Job
from agent.tensorjob import TensorJob
from agent.tensors import read_answer, write_outputs
from schemas.base import Value
from schemas.codec import JSON, decode_plain
from schemas.errors import ErrorCode, ResplitError
from schemas.request import EmbeddingRequest, OipTensor, Request, TensorRequest, TextRequest
from schemas.tensor import Array

STOPS_MAX = 4
"""As many as OpenAI takes; the others are watched for here."""
SHOWN = 200


@dataclass(frozen=True)
class Ask:
    """What is sent: a POST to `path`, below the endpoint's URL."""

    path: str
    body: bytes


@dataclass(frozen=True)
class Said:
    """What came back, and what the cloud counted of it. One of `text`, `vectors` and `tensors` is there."""

    text: str | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    vectors: tuple[tuple[float, ...], ...] | None = None
    tensors: dict[str, Array] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


def can_say(request: Request, protocol: Protocol) -> bool:
    """Whether a cloud can be asked this."""
    match request:
        case TextRequest():
            plain = not (
                request.logprobs
                or request.ignore_eos
                or request.top_k
                or request.min_p
                or request.constraint
                or request.tools
            )
            return protocol == "openai" and plain
        case EmbeddingRequest():
            return protocol == "openai"
        case TensorRequest():
            return protocol == "oip"


def ask_of(job: Job, model: str) -> Ask:
    """The request of a job that `can_say`."""
    match job:
        case Generation():
            return _text(job, model)
        case TensorJob() if isinstance(job.request, EmbeddingRequest):
            given = job.request.input
            return _ask("/embeddings", {"model": model, "input": [given] if isinstance(given, str) else list(given)})
        case TensorJob():
            inputs = write_outputs(job.waiting[0][1], tuple(job.waiting[0][1]), binary=False)
            body = {
                "id": job.request_id,
                "inputs": [one.model_dump(exclude_none=True) for one in inputs],
                "outputs": [{"name": name} for name in job.outputs],
            }
            return _ask(f"/v2/models/{quote(model, safe='')}/infer", body)
    raise AssertionError("no cloud answers for a pipeline")


def _text(job: Generation, model: str) -> Ask:
    request = job.request
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": job.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop[:STOPS_MAX])
    if request.messages is not None:
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        return _ask("/chat/completions", {**body, "messages": messages})
    prompt = request.prompt if request.prompt is not None else job.text.decode(job.prompt)
    return _ask("/completions", {**body, "prompt": prompt})


def _ask(path: str, body: dict[str, Any]) -> Ask:
    return Ask(path, json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())


class _Foreign(Value):
    """What others write may say more than is read here."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Spent(_Foreign):
    prompt_tokens: int = Field(default=0, ge=0, lt=1 << 31)
    completion_tokens: int | None = Field(default=0, ge=0, lt=1 << 31)


class _Message(_Foreign):
    content: str


class _Choice(_Foreign):
    finish_reason: str
    text: str | None = None
    message: _Message | None = None


class _Completion(_Foreign):
    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Spent | None = None


class _Vector(_Foreign):
    index: int
    embedding: tuple[float, ...] = Field(min_length=1)


class _Embeddings(_Foreign):
    data: tuple[_Vector, ...]
    usage: _Spent | None = None


class _Tensors(_Foreign):
    outputs: tuple[OipTensor, ...]


def read_said(data: bytes, job: Job) -> Said:
    """What a cloud answered to a job. Raises CLOUD_FAILED for what is no answer to it."""
    try:
        plain = decode_plain(data, JSON, "the answer")
        match job:
            case Generation():
                return _completion(_Completion.model_validate(plain))
            case TensorJob() if isinstance(job.request, EmbeddingRequest):
                return _embeddings(_Embeddings.model_validate(plain), job)
            case TensorJob():
                found = _Tensors.model_validate(plain)
                return Said(tensors=read_answer(found.outputs, job.outputs, job.manifest))
    except ValidationError as error:
        raise nonsense(ResplitError.from_validation(error, "the answer").message) from error
    except ResplitError as error:
        raise error if error.code is ErrorCode.CLOUD_FAILED else nonsense(error.message) from error
    raise AssertionError("no cloud answers for a pipeline")


def _completion(found: _Completion) -> Said:
    choice = found.choices[0]
    text = choice.text if choice.message is None else choice.message.content
    if text is None:
        raise nonsense("its first choice has neither `text` nor `message`")
    spent = found.usage or _Spent()
    for reason in ("stop", "length"):
        if choice.finish_reason == reason:
            return Said(text, reason, None, None, spent.prompt_tokens, spent.completion_tokens or 0)
    raise nonsense(f"it ended as {choice.finish_reason[:SHOWN]!r}, and neither at a stop nor at the length asked for")


def _embeddings(found: _Embeddings, job: TensorJob) -> Said:
    count, size = len(job.waiting), job.manifest.outputs[0].shape[-1]
    by_index = {one.index: one.embedding for one in found.data}
    if by_index.keys() != set(range(count)):
        raise nonsense(f"it has vectors {sorted(by_index)[:8]} for {count} text(s)")
    vectors = tuple(by_index[i] for i in range(count))
    lengths = {len(vector) for vector in vectors}
    if len(lengths) > 1 or (isinstance(size, int) and lengths != {size}):
        raise nonsense(f"its vectors have {sorted(lengths)[:8]} numbers, the model's have {size}")
    return Said(vectors=vectors, prompt_tokens=(found.usage or _Spent()).prompt_tokens)


def nonsense(why: str) -> ResplitError:
    """The error of an answer that is none."""
    return ResplitError(ErrorCode.CLOUD_FAILED, f"the cloud's answer makes no sense: {why}")

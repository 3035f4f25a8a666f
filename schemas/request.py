"""Requests and replies of the wire, field for field (`docs/protocol.md`)."""

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.base import RequestName, Value
from schemas.errors import ErrorBody, ErrorCode, ResplitError
from schemas.slo import BEST_EFFORT, PRIORITY_MAX, TARGET_MS_MAX, Slo

MAX_REQUEST_BYTES = 1 << 20
"""NATS' default limit; larger tensors come in several inputs or are refused."""
DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_COUNT = 1 << 31
MAX_LOGPROBS = 20
MAX_TOOLS = 128
CONSTRAINT_CHARS_MAX = 1 << 16


class Message(Value):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="allow")

    role: str
    content: str


class Constraint(Value):
    """The form that an output must have; exactly one of these says it."""

    json_schema: dict[str, Any] | None = None
    """A JSON document that meets this schema, without white space that it does not need."""
    regex: str | None = Field(default=None, min_length=1, max_length=CONSTRAINT_CHARS_MAX)
    """The whole output matches it."""
    lark: str | None = Field(default=None, min_length=1, max_length=CONSTRAINT_CHARS_MAX)
    """A context-free grammar in llguidance's form of Lark."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(one is not None for one in (self.json_schema, self.regex, self.lark)) != 1:
            raise ValueError("give exactly one of json_schema, regex and lark")
        if self.json_schema is not None and len(json.dumps(self.json_schema)) > CONSTRAINT_CHARS_MAX:
            raise ValueError(f"json_schema has more than {CONSTRAINT_CHARS_MAX} characters")
        return self


class RequestBase(Value):
    """What every request may say."""

    request_id: RequestName | None = None
    """Chosen by the client, else by the ingress. Unique among the requests in flight."""
    deadline_ms: int | None = Field(default=None, ge=-TARGET_MS_MAX, le=TARGET_MS_MAX)
    """Milliseconds from arrival within which the last token must be out; 0 or less has passed already."""
    ttft_ms: float | None = Field(default=None, gt=0, le=TARGET_MS_MAX)
    """An objective: milliseconds from arrival to the first token."""
    tpot_ms: float | None = Field(default=None, gt=0, le=TARGET_MS_MAX)
    """An objective: mean milliseconds per token after the first."""
    priority: int | None = Field(default=None, ge=-PRIORITY_MAX, le=PRIORITY_MAX)
    """Higher goes first."""
    edge_only: bool = False
    """Whether it must not leave the cluster, even where nothing here can answer it (`Deployment.cloud`)."""
    acknowledge: bool = False
    """Whether the first reply is to say that it was accepted, as it does of a streamed request anyway."""
    model: str | None = None
    """Accepted and ignored, as OpenAI clients send it: the subject names the deployment."""
    user: str | None = None
    """Accepted and ignored."""

    def slo(self, default: Slo | None) -> Slo:
        """The request's class: what it says itself, else what its deployment says."""
        said = {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "deadline_ms": self.deadline_ms,
            "priority": self.priority,
        }
        return (default or BEST_EFFORT).model_copy(
            update={name: value for name, value in said.items() if value is not None}
        )


class TextRequest(RequestBase):
    """A completion. Exactly one of `prompt`, `messages`, `token_ids`. Names and defaults are OpenAI's."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)
    token_ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=1, le=MAX_COUNT)
    temperature: float = Field(default=0.0, ge=0, le=10)
    """0 is greedy. (OpenAI's default is 1; here an answer is reproducible unless one asks otherwise.)"""
    top_k: int = Field(default=0, ge=0, le=MAX_COUNT)
    """0 keeps every token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: tuple[str, ...] = Field(default=(), max_length=MAX_STOPS)
    stream: bool = False
    logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    """How many alternatives to report with each token; 0 reports none, not even the token's own."""
    ignore_eos: bool = False
    """Generate `max_tokens` tokens whatever they are; for measurements."""
    tools: tuple[dict[str, Any], ...] | None = Field(default=None, min_length=1, max_length=MAX_TOOLS)
    """With `messages`: what the model may call, as its chat template reads it. Calls come in the text, as the model
    writes them."""
    constraint: Constraint | None = None
    """The form that the output must have."""

    @model_validator(mode="before")
    @classmethod
    def _one_stop_may_stand_alone(cls, data: Any) -> Any:
        if isinstance(data, dict):
            stop = data.get("stop")
            if isinstance(stop, str):
                data = {**data, "stop": (stop,)}
            elif stop is None and "stop" in data:
                data = {name: value for name, value in data.items() if name != "stop"}
        return data

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        given = [n for n in ("prompt", "messages", "token_ids") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, messages and token_ids, not {given or 'none'}")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools go with messages")
        if self.constraint is not None and self.ignore_eos:
            raise ValueError("constraint says where the output ends, and ignore_eos that it does not")
        return self


class EmbeddingRequest(RequestBase):
    """Text to vectors, with OpenAI's field name."""

    input: str | tuple[str, ...]


class OipTensor(BaseModel):
    """A tensor of the Open Inference Protocol v2.

    Its values are `data` (a flat or nested list, row-major) or, in the binary form, `raw`: bytes,
    little-endian and row-major (msgpack only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None
    raw: bytes | None = Field(default=None, strict=True)

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if (self.data is None) == (self.raw is None):
            raise ValueError("give either data or raw")
        return self


class RequestedOutput(BaseModel):
    """An output the client asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: dict[str, Any] | None = None


class TensorRequest(RequestBase):
    """An inference of the Open Inference Protocol v2. Its `id` is given back; it need not be unique."""

    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: tuple[OipTensor, ...] = Field(min_length=1)
    outputs: tuple[RequestedOutput, ...] | None = None


Request = TextRequest | EmbeddingRequest | TensorRequest


def read_request(plain: Any) -> Request:
    """The request in decoded JSON or msgpack, by the input it carries; raises `ResplitError`."""
    if not isinstance(plain, dict):
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a request is an object with named fields")
    kind: type[Request] = TextRequest
    if "inputs" in plain:
        kind = TensorRequest
    elif "input" in plain:
        kind = EmbeddingRequest
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise ResplitError.from_validation(error, "request") from error


class StageTiming(Value):
    """What one stage spent on one request."""

    node: str
    first: int
    last: int
    compute_ms: float
    """Time in ONNX Runtime in the calls this request took part in."""
    queue_ms: float
    """Time its frames waited at this stage for the compute thread."""
    calls: int


class StepTiming(Value):
    """What one service of a pipeline spent on one request."""

    service: str
    nodes: tuple[str, ...]
    """That computed it."""
    waited_ms: float
    """From the request's arrival until all that it waits for was there."""
    total_ms: float
    """From then until its answer was there."""
    compute_ms: float
    """Of that, in ONNX Runtime."""


class CloudUse(Value):
    """What a cloud took for a request that it answered."""

    name: str
    """Of the endpoint."""
    model: str
    total_ms: float
    """From asking to the answer."""
    prompt_tokens: int
    completion_tokens: int
    """As the cloud counts; 0 where it does not say."""
    cost: float
    """By the endpoint's prices."""


class Usage(Value):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    """Of the prompt: those whose caches were kept from an earlier turn, so that they were not computed again."""
    recovered: Literal["identical", "equivalent"] | None = None
    """None unless it was computed anew on the way. `identical`: exactly, nothing can differ from an undisturbed run.
    `equivalent`: tokens that had come out were prefilled, so those after them may differ (`Settings.recovery`)."""
    queued_ms: float
    """From arrival to the first prefill chunk."""
    ttft_ms: float | None = None
    """From arrival to the first token."""
    tpot_ms: float | None = None
    """Mean time per token after the first."""
    total_ms: float
    network_ms: float
    """Time its frames were under way but neither computed nor queued in any stage: links, encoding, wake-ups."""
    epoch: int
    route: int
    stages: tuple[StageTiming, ...]
    steps: tuple[StepTiming, ...] | None = None
    """Of a pipeline: its services, in the order in which they were done."""
    cloud: CloudUse | None = None
    """Of one that a cloud answered: it ran over no route, so there are no `stages` and `route` says nothing."""


class AcceptedReply(Value):
    """First reply to a request that is streamed, or asks for it: it will end in output or one typed error."""

    request_id: RequestName
    status: Literal["accepted"] = "accepted"
    deployment: str
    epoch: int
    loads_s: float | None = None
    """The model is cold, and so long it took last time until it was loaded; None where it is loaded."""


class TokenLogprob(Value):
    """A token the model might have taken, and the natural logarithm of its probability."""

    token_id: int
    logprob: float
    text: str | None = None
    """How it is spelled by itself; a part of a character as the replacement character."""


class TokenReply(Value):
    """One token of a streamed completion. The last one also says why it ended and what it cost."""

    request_id: RequestName
    index: int
    token_id: int
    text: str
    """The text that became certain with this token; may be empty inside a multi-byte character."""
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None


class CompletionReply(Value):
    """The whole of a completion that was not streamed."""

    request_id: RequestName
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    finish_reason: Literal["stop", "length"]
    usage: Usage


class EmbeddingItem(Value):
    """One vector, in the order of the inputs."""

    index: int
    embedding: tuple[float, ...]


class EmbeddingReply(Value):
    """The vectors of an `EmbeddingRequest`."""

    request_id: RequestName
    data: tuple[EmbeddingItem, ...]
    usage: Usage


class TensorReply(BaseModel):
    """The Open Inference Protocol v2 answer; tensors come back in the form the request used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str
    id: str
    model_name: str
    outputs: tuple[OipTensor, ...]
    usage: Usage


class ErrorReply(Value):
    """The one final reply of a request that did not end in output."""

    request_id: RequestName | None = None
    error: ErrorBody
    refused: Literal[True] | None = None
    """It was not accepted by who says so. Of one that was asked again another ingress may have."""

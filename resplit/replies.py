"""What the client hands to an application: plain dataclasses, and the one error it raises.

They mirror the replies of the wire (`docs/protocol.md`) and ignore fields they do not know, so that an
application keeps working when a newer cluster says more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class RequestError(Exception):
    """A request that did not end in output.

    `code` is stable and for programs (`docs/protocol.md` lists the codes), `message` one sentence for
    people, `field` the field of the request at fault where there is one. `estimate_ms` says how long the request
    would have taken, where it was refused because it could not meet its deadline.
    """

    def __init__(
        self,
        code: str,
        message: str,
        field: str | None = None,
        request_id: str | None = None,
        estimate_ms: float | None = None,
    ) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.field = field
        self.request_id = request_id
        self.estimate_ms = estimate_ms


@dataclass(frozen=True, slots=True)
class StageTiming:
    """What one stage spent on one request."""

    node: str
    first: int
    last: int
    compute_ms: float
    queue_ms: float
    calls: int


@dataclass(frozen=True, slots=True)
class StepTiming:
    """What one service of a pipeline spent on one request."""

    service: str
    nodes: tuple[str, ...]
    waited_ms: float
    total_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class CloudUse:
    """What a cloud took for a request that it answered, with what it counted and what that costs."""

    name: str
    model: str
    total_ms: float
    prompt_tokens: int
    completion_tokens: int
    cost: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, as the agents measured it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    queued_ms: float
    total_ms: float
    network_ms: float
    """Time not spent waiting or computing in any stage: links, encoding, scheduling."""
    epoch: int
    route: int
    stages: tuple[StageTiming, ...]
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    recovered: str | None = None
    """None unless it was computed anew on the way: `identical`, as if nothing had happened, or `equivalent`."""
    steps: tuple[StepTiming, ...] = ()
    """Of a pipeline: its services, in the order in which they were done."""
    cloud: CloudUse | None = None
    """None unless a cloud answered it, and none of the nodes."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token the model might have taken, and the natural logarithm of its probability."""

    token_id: int
    logprob: float
    text: str | None = None
    """How it is spelled; None where the agent is of a release that does not say."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a completion; the last one has `finish_reason` and `usage`."""

    request_id: str
    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    texts: tuple[str, ...] = ()
    """What each token made certain; together they are `text`."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in the order of the texts."""

    request_id: str
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the Open Inference Protocol v2: `data` is a flat list, or little-endian row-major bytes."""

    shape: tuple[int, ...]
    datatype: str
    data: list[Any] | bytes


@dataclass(frozen=True, slots=True)
class TensorResult:
    """The outputs of a tensor model, by name."""

    request_id: str
    outputs: dict[str, Tensor]
    usage: Usage


Plain = Mapping[str, Any]


def read_error(reply: Plain, request_id: str) -> RequestError | None:
    """The error a reply carries, or None if it carries output."""
    error = reply.get("error")
    if error is None:
        return None
    named = reply.get("request_id") or request_id
    return RequestError(error["code"], error["message"], error.get("field"), named, error.get("estimate_ms"))


def read_token(reply: Plain) -> Token:
    """One token of a stream. Raises KeyError or TypeError if the reply is not one."""
    usage = reply.get("usage")
    return Token(
        request_id=reply["request_id"],
        index=int(reply["index"]),
        token_id=int(reply["token_id"]),
        text=str(reply["text"]),
        logprob=reply.get("logprob"),
        top_logprobs=_read_top(reply.get("top_logprobs")),
        finish_reason=reply.get("finish_reason"),
        usage=None if usage is None else read_usage(usage),
    )


def read_usage(usage: Plain) -> Usage:
    """What a request cost. Raises KeyError or TypeError if a field is missing."""
    return Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        total_tokens=usage["total_tokens"],
        cached_tokens=usage.get("cached_tokens", 0),
        queued_ms=usage["queued_ms"],
        total_ms=usage["total_ms"],
        network_ms=usage["network_ms"],
        epoch=usage["epoch"],
        route=usage["route"],
        stages=tuple(
            StageTiming(s["node"], s["first"], s["last"], s["compute_ms"], s["queue_ms"], s["calls"])
            for s in usage["stages"]
        ),
        ttft_ms=usage.get("ttft_ms"),
        tpot_ms=usage.get("tpot_ms"),
        recovered=usage.get("recovered"),
        steps=tuple(
            StepTiming(s["service"], tuple(s["nodes"]), s["waited_ms"], s["total_ms"], s["compute_ms"])
            for s in usage.get("steps") or ()
        ),
        cloud=_read_cloud(usage.get("cloud")),
    )


def _read_cloud(use: Plain | None) -> CloudUse | None:
    if use is None:
        return None
    counted = (use["prompt_tokens"], use["completion_tokens"])
    return CloudUse(use["name"], use["model"], use["total_ms"], *counted, use["cost"])


def read_embeddings(reply: Plain) -> Embeddings:
    """Vectors in the order of the inputs. Raises KeyError or TypeError if the reply has none."""
    items = sorted(reply["data"], key=lambda item: int(item["index"]))
    vectors = tuple(tuple(item["embedding"]) for item in items)
    return Embeddings(reply["request_id"], vectors, read_usage(reply["usage"]))


def read_tensors(reply: Plain) -> TensorResult:
    """Output tensors by name. Raises KeyError or TypeError if the reply has none."""
    outputs = {
        output["name"]: Tensor(
            tuple(output["shape"]),
            output["datatype"],
            output["raw"] if output.get("raw") is not None else output["data"],
        )
        for output in reply["outputs"]
    }
    return TensorResult(reply["request_id"], outputs, read_usage(reply["usage"]))


def gather(tokens: list[Token]) -> Completion:
    """The completion that a finished stream of tokens amounts to."""
    last = tokens[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    scored = last.logprob is not None
    ranked = last.top_logprobs is not None
    return Completion(
        request_id=last.request_id,
        token_ids=tuple(token.token_id for token in tokens),
        text="".join(token.text for token in tokens),
        texts=tuple(token.text for token in tokens),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(t.logprob for t in tokens if t.logprob is not None) if scored else None,
        top_logprobs=tuple(t.top_logprobs for t in tokens if t.top_logprobs is not None) if ranked else None,
    )


def _read_top(top: Any) -> tuple[TokenLogprob, ...] | None:
    return (
        None
        if top is None
        else tuple(TokenLogprob(entry["token_id"], entry["logprob"], entry.get("text")) for entry in top)
    )

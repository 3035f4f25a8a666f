"""PURE: what clients of OpenAI's API may ask, and what the wire is asked for it (`docs/protocol.md`).

A field that OpenAI has and this has not is refused by its name unless its value asks for nothing; a field that nobody
knows is refused as well. What the wire knows beyond OpenAI (`top_k`, `min_p`, `ttft_ms`, `deadline_ms`, ...) may stand
in the body as it is, as clients say with `extra_body`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from resplit.gateway.tool_calls import schema_of_calls
from schemas.request import MAX_COUNT, MAX_LOGPROBS

CHOICES_MAX = 16
"""Answers to one request: each is a request of its own in the cluster."""
COMPLETION_TOKENS = 16
"""Of `/v1/completions` where nothing is said, as at OpenAI."""
Wire = dict[str, Any]
Json = dict[str, Any]

INERT = frozenset({
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "user", "parallel_tool_calls", "reasoning_effort", "verbosity",
})  # fmt: skip
"""Accepted and ignored: what answers are asked for does not depend on them."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "modalities": (["text"], None),
    "audio": (None,),
    "prediction": (None,),
    "moderation": (None,),
    "web_search_options": (None,),
    "functions": (None,),
    "function_call": (None,),
    "suffix": ("", None),
    "echo": (False, None),
    "best_of": (1, None),
}
"""Fields of OpenAI's that are not there, with the values that ask for nothing."""


class Body(BaseModel):
    """What every request of OpenAI's API is read as."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if name in data and name not in cls.model_fields and data[name] not in neutral:
                raise ValueError(f"{name}: {name} is not supported here; leave it out")
        # What is null was not said.
        asked = {name: value for name, value in data.items() if value is not None or name == "model"}
        return {
            name: value
            for name, value in asked.items()
            if name in cls.model_fields or (name not in INERT and name not in NEUTRAL)
        }


class StreamOptions(BaseModel):
    """What a stream says beside the text."""

    model_config = ConfigDict(frozen=True)

    include_usage: bool = False


class Generating(Body):
    """What chats and completions have in common."""

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT, strict=True)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63, strict=True)
    stop: str | tuple[str, ...] | None = None
    n: int = Field(default=1, ge=1, le=CHOICES_MAX, strict=True)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: int | None = None
    priority: int | None = None
    edge_only: bool | None = None

    @property
    def said(self) -> Wire:
        """Fields that the wire takes as they are."""
        names = (
            "temperature", "top_p", "stop", "top_k", "min_p", "ignore_eos", "ttft_ms", "tpot_ms", "deadline_ms",
            "priority", "edge_only",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "stop" in found and not isinstance(found["stop"], str):
            found["stop"] = list(found["stop"])
        return found

    def seeded(self, wire: Wire, number: int) -> Wire:
        """The request for choice `number`: with a seed of its own where all have one."""
        return wire if self.seed is None else {**wire, "seed": (self.seed + number) % (1 << 63)}


class Function(BaseModel):
    """A function that the model may have called."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: Json | None = None


class Tool(BaseModel):
    """A tool as OpenAI describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The function that must be called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    """The tool that must be called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """The schema that an answer must meet."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str
    description: str | None = None
    content: Json = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with the type json_schema, and with no other")
        return self

    @property
    def schema_of_answer(self) -> Json | None:
        """A JSON schema; None where any text will do."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.content


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[Json, ...] | None = None
    name: str | None = None
    tool_calls: tuple[Json, ...] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise ValueError("content is missing")
        for part in self.content if isinstance(self.content, tuple) else ():
            if part.get("type") not in ("text", "refusal"):
                raise ValueError(f"content of type {part.get('type')!r} is not supported; models here read text")
        return self

    @property
    def wire(self) -> Wire:
        """The turn as chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(map(_text_of, self.content or ()))
        found: Wire = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or self.refusal or "",
        }
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.tool_calls:
            found["tool_calls"] = [dict(call) for call in self.tool_calls]
        return found


class ChatRequest(Generating):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT, strict=True)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, strict=True)
    response_format: ResponseFormat | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"

    @model_validator(mode="after")
    def _tools_are_there(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: top_logprobs is given with logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice: tool_choice names {self.tool_choice.function.name!r}, which is none of the tools"
            )
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: tool_choice is `required` and there are no tools")
        form = None if self.response_format is None else self.response_format.schema_of_answer
        if names and self.tool_choice != "none" and form is not None:
            raise ValueError("response_format: response_format is of answers, and goes with tool_choice `none`")
        return self

    def wires(self) -> Sequence[Wire]:
        """What the cluster is asked, once for each choice."""
        wire = {
            **self.said,
            "messages": [message.wire for message in self.messages],
            # As many as the context holds: the wire takes what is left of it.
            "max_tokens": self.max_completion_tokens or self.max_tokens or MAX_COUNT,
        }
        if self.logprobs:
            wire["logprobs"] = max(1, self.top_logprobs)
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        if tools and self.tool_choice != "none":
            wire["tools"] = tools
        if (schema := self._schema(tools)) is not None:
            wire["constraint"] = {"json_schema": schema}
        return [self.seeded(wire, number) for number in range(self.n)]

    def _schema(self, tools: Sequence[Json]) -> Json | None:
        """Of the whole answer, where it must have one: that of a call, if one must be made."""
        if isinstance(self.tool_choice, NamedTool):
            return schema_of_calls(tools, self.tool_choice.function.name)
        if self.tool_choice == "required":
            return schema_of_calls(tools)
        return None if self.response_format is None else self.response_format.schema_of_answer


class CompletionRequest(Generating):
    """`POST /v1/completions`: each prompt is answered `n` times."""

    prompt: str | tuple[str, ...] | tuple[int, ...] | tuple[tuple[int, ...], ...]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, strict=True)

    @property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        """One or several; token ids alone are one."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if all(isinstance(one, int) for one in self.prompt):
            return (self.prompt,)  # type: ignore[return-value]
        return self.prompt  # type: ignore[return-value]

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if not 1 <= len(self.prompts) * self.n <= CHOICES_MAX:
            raise ValueError(f"n: 1 to {CHOICES_MAX} answers are given to one request, prompts times n")
        return self

    def wires(self) -> Sequence[Wire]:
        """What the cluster is asked, once for each choice."""
        common = {**self.said, "max_tokens": self.max_tokens or COMPLETION_TOKENS}
        if self.logprobs is not None:
            common["logprobs"] = max(1, self.logprobs)
        return [
            self.seeded({**common, **({"prompt": one} if isinstance(one, str) else {"token_ids": list(one)})}, number)
            for one in self.prompts
            for number in range(self.n)
        ]


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`."""

    input: str | tuple[str, ...] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    priority: int | None = None
    deadline_ms: int | None = None
    edge_only: bool | None = None

    @model_validator(mode="after")
    def _keeps_its_dimensions(self) -> Self:
        if self.dimensions is not None:
            raise ValueError("dimensions: dimensions is not supported here; leave it out")
        return self

    @property
    def wire(self) -> Wire:
        """What the cluster is asked beside the texts."""
        said = {"priority": self.priority, "deadline_ms": self.deadline_ms, "edge_only": self.edge_only}
        return {name: value for name, value in said.items() if value is not None}


def _text_of(part: Json) -> str:
    return str(part.get("text") or part.get("refusal") or "")

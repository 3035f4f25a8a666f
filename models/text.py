"""Text to token ids and back: templates in, incremental text out, stop strings watched for."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from models.constraint import Constrained, Vocabulary
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import TextSpec
from schemas.request import Constraint

UNFINISHED = "�"
# Tokens decoded again with each new one. A character has four bytes at most, so more tokens than this
# without a whole character among them are not text and are let through as they decode.
WINDOW_TOKENS = 8
LONG_CHARS = 1 << 15
"""Encoding more than this takes an event loop more than some ten milliseconds; a megabyte takes a second."""
LATELY_MAX = 8


class Text:
    """The tokenizer of a model and its chat template."""

    def __init__(self, spec: TextSpec, tokenizer_path: Path) -> None:
        """Raises CORRUPT_FILE when the file is not a tokenizer, INVALID_REQUEST when the template is not one."""
        self._spec = spec
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_path))
        except Exception as error:
            # The library raises plain Exception for every fault of the file.
            message = f"{tokenizer_path} is not a tokenizer ({error}); fetch it again"
            raise ResplitError(ErrorCode.CORRUPT_FILE, message) from error
        # Files of embedders often carry a padding and a cut-off of their own; length is decided elsewhere.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._template = _compile(spec.chat_template) if spec.chat_template is not None else None
        self._path = tokenizer_path
        self._lately: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()
        """Long texts that were encoded lately: so it may be done in a thread, ahead of who needs it."""
        self._vocabulary: Vocabulary | ResplitError | None = None

    def encode(self, prompt: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer's own post-processor adds."""
        return self._encoded(prompt, special=True)

    def encode_messages(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """The ids of a conversation by the model's chat template, up to where the assistant begins to answer; `tools`
        are what it may call.

        Raises INVALID_REQUEST when the model has no template, or none that knows tools, or it refuses the messages.
        """
        rendered = self.render(messages, tools)
        # A template that writes the first token itself must not get a second one from the post-processor.
        special = not (self._spec.bos_token and rendered.startswith(self._spec.bos_token))
        return self._encoded(rendered, special=special)

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The text the chat template makes of a conversation. Raises as `encode_messages`."""
        if self._template is None:
            raise ResplitError(
                ErrorCode.INVALID_REQUEST,
                "this model has no chat template; send a prompt instead of messages",
                "messages",
            )
        if tools and not self._template.knows_tools:
            message = "the chat template of this model knows no tools; leave them out"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "tools")
        try:
            return self._template.compiled.render(
                messages=[with_read_arguments(message) for message in messages],
                tools=None if tools is None else list(tools),
                bos_token=self._spec.bos_token or "",
                eos_token=self._spec.eos_token or "",
                add_generation_prompt=True,
            )
        except Exception as error:
            # A template is a program: it may raise whatever its filters raise on content it did not expect.
            message = f"the chat template refuses the messages ({error}); check their roles and order"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "messages") from error

    @property
    def knows_vocabulary(self) -> bool:
        """Whether outputs can be constrained now, without what `learn_vocabulary` takes."""
        return self._vocabulary is not None

    def learn_vocabulary(self) -> None:
        """Get ready to constrain outputs: a second, and a hundred megabytes, of a vocabulary of 150,000 tokens. May run
        in a thread."""
        if self._vocabulary is not None:
            return
        try:
            self._vocabulary = Vocabulary(self._spec, self._path)
        except Exception as error:  # llguidance raises what it likes for what it does not know
            message = f"outputs of this model cannot be constrained: its tokenizer is not understood ({error})"
            self._vocabulary = ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, "constraint")

    def constrained(self, constraint: Constraint) -> Constrained:
        """An output that follows `constraint`. Raises `ResplitError(INVALID_REQUEST)` for one that cannot be met, and
        `UNSUPPORTED_MODEL` where none can."""
        self.learn_vocabulary()
        if not isinstance(self._vocabulary, Vocabulary):
            assert self._vocabulary is not None
            raise self._vocabulary
        return self._vocabulary.constrained(constraint)

    def encode_output(self, text: str) -> list[int]:
        """The ids of what a model has said: no special token is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        key = (text, special)
        if (known := self._lately.get(key)) is not None:
            return list(known)
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if len(text) > LONG_CHARS:
            self._lately[key] = ids
            while len(self._lately) > LATELY_MAX:
                self._lately.popitem(last=False)
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def spelled(self, token_id: int) -> str:
        """One token by itself, special ones by their name."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def stream(self) -> "Detokenizer":
        """A decoder for one output, token by token."""
        return Detokenizer(self)


class Detokenizer:
    """One output's text as it becomes certain.

    A token may end in the middle of a character, and a decoder may treat the first token of a text
    specially; so each token is decoded together with a few before it, and what those alone gave is
    subtracted. The window is bounded, so a token costs the same however long the output is.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._window: list[int] = []
        self._settled = 0
        """How many tokens at the start of the window have been turned into text already."""

    def push(self, token_id: int) -> str:
        """The text that this token made certain: empty while a character is unfinished."""
        self._window.append(token_id)
        before = self._text.decode(self._window[: self._settled])
        after = self._text.decode(self._window)
        waiting = len(self._window) - self._settled
        if after.endswith(UNFINISHED) and waiting < WINDOW_TOKENS:
            return ""
        return self._settle(before, after)

    def flush(self) -> str:
        """What is left when the output ends, an unfinished character as the replacement character."""
        before = self._text.decode(self._window[: self._settled])
        return self._settle(before, self._text.decode(self._window))

    def _settle(self, before: str, after: str) -> str:
        if len(after) == len(before):
            # Nothing visible came (a special token): the context stays what it was.
            del self._window[self._settled :]
            return ""
        # The tokens just settled become the context of the next ones; older ones are forgotten.
        del self._window[: self._settled]
        self._settled = len(self._window)
        return after[len(before) :]


@dataclass(frozen=True)
class Emitted:
    """What a stop watch lets through, and whether a stop string ended the output."""

    text: str
    stopped: bool


class StopText:
    """Watches an output for stop strings; text that may be the beginning of one is held back.

    The stop string itself is never let through. Of several that match, the one that begins first wins.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> Emitted:
        """Let through what can no longer be part of a stop string; nothing after a stop."""
        if self._stopped:
            return Emitted("", stopped=True)
        self._held += text
        starts = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if starts:
            self._stopped = True
            return Emitted(self._take(min(starts)), stopped=True)
        return Emitted(self._take(len(self._held) - self._possible_start()), stopped=False)

    def flush(self) -> str:
        """What was held back when the output ends without a stop."""
        return "" if self._stopped else self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _possible_start(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


@dataclass(frozen=True)
class _Template:
    compiled: jinja2.Template
    knows_tools: bool


def _compile(source: str) -> _Template:
    # A template comes with the model, from strangers: the sandbox keeps it from Python's internals.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        return _Template(environment.from_string(source), "tools" in names)
    except jinja2.TemplateError as error:
        message = f"the model's chat template is not valid ({error}); import the model with a corrected one"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "chat_template") from error


def with_read_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A turn whose calls have their arguments as values, as templates want them; clients send them as JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_with_values(call) for call in calls]}


def _with_values(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

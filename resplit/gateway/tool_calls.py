"""PURE: function calls in what a model says, found while it is being said.

Models write calls each in its own way. Three are read: JSON between `<tool_call>` and `</tool_call>` (Hermes, Qwen),
`[TOOL_CALLS]` and a JSON list (Mistral), and an answer that is one JSON object with a `name` and with `arguments` or
`parameters` (Llama 3, and every answer that was constrained to be a call). What is none of these is text, and let
through; what might become one is held back until it is known.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE, LISTED = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One function that the model calls."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True)
class Found:
    """What became certain: text to show, and calls that are complete."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class CallReader:
    """Reads one answer. `names` are the functions there are: JSON that calls no other is text."""

    def __init__(self, names: Sequence[str], request: str) -> None:
        self._names = frozenset(names)
        self._request = request
        self._held = ""
        self._said = False
        """Whether any text but white space was let through: a bare JSON object after that is text."""
        self.count = 0

    def push(self, text: str) -> Found:
        """The next piece of the answer."""
        self._held += text
        return self._joined(self._read(ended=False))

    def flush(self) -> Found:
        """What was held back, once the answer has ended."""
        return self._joined(self._read(ended=True))

    def _read(self, ended: bool) -> Iterator[Found]:
        while self._held:
            if not self._said and self._held.lstrip().startswith("{"):
                if not ended:
                    return
                yield self._called(self._held, self._held)
                self._held = ""
                return
            if LISTED in self._held:
                before, _, after = self._held.partition(LISTED)
                if not ended:
                    self._held = self._held[len(before) :]
                    yield Found(before)
                    return
                self._held = ""
                yield Found(before)
                yield self._called(after, LISTED + after)
                return
            before, opened, after = self._held.partition(OPEN)
            if opened:
                inside, closed, rest = after.partition(CLOSE)
                if not closed and not ended:
                    self._held = opened + after
                    yield Found(before)
                    return
                self._held = rest
                yield Found(before)
                yield self._called(inside, opened + inside + closed)
                continue
            keep = 0 if ended else max(_begins(self._held, OPEN), _begins(self._held, LISTED))
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if not self._said and not text.strip() and not ended:
                self._held = text + self._held  # white space before what may be a call
                return
            yield Found(text)
            return

    def _called(self, text: str, raw: str) -> Found:
        """The calls in `text`; `raw` as text where it is none."""
        calls = tuple(self._calls(text))
        return Found("", calls) if calls else Found(raw)

    def _calls(self, text: str) -> Iterator[Call]:
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            return
        found = [self._call(one) for one in (plain if isinstance(plain, list) else [plain])]
        if all(one is not None for one in found):
            for one in found:
                assert one is not None
                name, arguments = one
                yield Call(f"call_{self._request[:24]}_{self.count}", name, arguments)
                self.count += 1

    def _call(self, plain: Any) -> tuple[str, str] | None:
        if not isinstance(plain, Mapping) or plain.get("name") not in self._names:
            return None
        arguments = plain.get("arguments", plain.get("parameters", {}))
        if isinstance(arguments, str):
            return plain["name"], arguments
        if not isinstance(arguments, Mapping):
            return None
        return plain["name"], json.dumps(arguments, ensure_ascii=False)

    def _joined(self, parts: Iterator[Found]) -> Found:
        text, calls = "", list[Call]()
        for part in parts:
            text += part.text
            calls += part.calls
            self._said = self._said or bool(part.text.strip())
        # White space around calls is no message.
        return Found(text if text.strip() or self._said else "", tuple(calls))


def schema_of_calls(tools: Sequence[Json], only: str | None = None) -> Json:
    """The JSON schema that an answer meets which is a call of one of `tools` and nothing else; `only` of this one."""
    of = [tool["function"] for tool in tools if only in (None, tool["function"]["name"])]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": one["name"]},
                "arguments": one.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in of
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _begins(text: str, mark: str) -> int:
    """How long an end of `text` is that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)

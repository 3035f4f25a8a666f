"""The pure parts of the gateway: what is read, what is answered, what is found in a model's words."""

import json
import random

import pytest
from pydantic import ValidationError

from resplit.gateway.failures import STATUS, body_of, headers_of, status_of
from resplit.gateway.openai_requests import INERT, NEUTRAL, ChatRequest, CompletionRequest, EmbeddingsRequest
from resplit.gateway.serving import Listening, parse_listen
from resplit.gateway.tool_calls import CallReader, schema_of_calls
from resplit.replies import RequestError
from schemas.errors import ErrorCode, ResplitError
from schemas.request import TextRequest, read_request

ONE = '{"name": "f", "arguments": {"a": 1}}'
TWO = '{"name": "g", "parameters": {"b": "<tool_call>"}}'


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        ("plain words < than <tool", "plain words < than <tool", []),
        (ONE, "", [("f", {"a": 1})]),
        (f"\n {ONE}\n", "", [("f", {"a": 1})]),
        (f"<tool_call>\n{ONE}\n</tool_call>", "", [("f", {"a": 1})]),
        (
            f"let me see <tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>",
            "let me see \n",
            [("f", {"a": 1})] * 2,
        ),
        (f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [("f", {"a": 1}), ("g", {"b": "<tool_call>"})]),
        ('{"name": "h", "arguments": {}}', '{"name": "h", "arguments": {}}', []),
        ('{"answer": 1}', '{"answer": 1}', []),
        (f"I would call {ONE}", f"I would call {ONE}", []),
        ("<tool_call>not json</tool_call> so", "<tool_call>not json</tool_call> so", []),
        (f"<tool_call>{ONE}", "", [("f", {"a": 1})]),
        ("<tool_call>{", "<tool_call>{", []),
        ('{"name": "f", "arguments": "{}"}', "", [("f", {})]),
        ('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": [1]}', []),
        ("  ", "", []),
        ("", "", []),
    ],
)
def test_calls_are_found_however_the_words_come(said: str, text: str, calls: list[tuple[str, object]]) -> None:
    draw = random.Random(said)
    for pieces in range(1, 30):
        reader = CallReader(["f", "g"], "request")
        cuts = sorted(draw.randrange(len(said) + 1) for _ in range(pieces - 1))
        found = [reader.push(said[a:b]) for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
        found.append(reader.flush())
        assert "".join(one.text for one in found) == text
        made = [call for one in found for call in one.calls]
        assert [(call.name, json.loads(call.arguments)) for call in made] == calls
        assert len({call.id for call in made}) == len(made) == reader.count


def test_text_is_not_held_back_longer_than_it_must() -> None:
    reader = CallReader(["f"], "r")
    assert reader.push("hello <tool").text == "hello "
    assert reader.push("s> and more").text == "<tools> and more"


def test_the_schema_of_calls_names_every_tool_or_the_one() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "ab"]
    assert [one["properties"]["name"]["const"] for one in schema_of_calls(tools)["anyOf"]] == ["a", "b"]
    assert schema_of_calls(tools, "b")["properties"]["name"] == {"const": "b"}


def test_every_error_of_the_cluster_has_a_status() -> None:
    faults_of_ours = {
        ErrorCode.INTERNAL, ErrorCode.CORRUPT_FILE, ErrorCode.MISSING_BLOB, ErrorCode.MISSING_KEYS,
        ErrorCode.STALE_EPOCH, ErrorCode.ROLLED_BACK, ErrorCode.EXPIRED, ErrorCode.PROVIDER_UNAVAILABLE,
        ErrorCode.MISSING_DEPENDENCY, ErrorCode.MODEL_TOO_LARGE, ErrorCode.UNKNOWN_NODE,
    }  # fmt: skip
    assert {*STATUS} | faults_of_ours == {*ErrorCode}
    assert status_of("of a newer release") == 500
    for code in ErrorCode:
        body = body_of(RequestError(code.value, "m", "f", "r"), "openai")["error"]
        assert (body["message"], body["param"], body["resplit_code"]) == ("m", "f", code.value)
        assert isinstance(body_of(RequestError(code.value, "m"), "oip")["error"], str)


def test_who_may_come_again_is_told_when() -> None:
    assert headers_of(RequestError("overloaded", "m")) == {"Retry-After": "1"}
    assert headers_of(RequestError("overloaded", "m", estimate_ms=7400.0)) == {"Retry-After": "7"}
    assert headers_of(RequestError("overloaded", "m", estimate_ms=1e9)) == {"Retry-After": "60"}
    assert headers_of(RequestError("invalid_request", "m")) == {}


CHAT = {"model": "a", "messages": [{"role": "user", "content": "hello"}]}


def test_what_is_asked_is_what_the_wire_takes() -> None:
    """Every request that is built here is one that an ingress reads."""
    chat = ChatRequest.model_validate(
        {
            **CHAT, "n": 2, "seed": -1, "stop": ["x"], "temperature": 1, "logprobs": True, "top_logprobs": 4,
            "top_k": 3,
            "max_completion_tokens": 7, "deadline_ms": 9, "edge_only": True, "user": "me", "metadata": {"a": "b"},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "required",
        }
    )  # fmt: skip
    wires = [read_request(wire) for wire in chat.wires()]
    assert all(isinstance(wire, TextRequest) for wire in wires)
    first, second = wires
    assert isinstance(first, TextRequest)
    assert isinstance(second, TextRequest)
    assert (first.max_tokens, first.logprobs, first.top_k, first.edge_only) == (7, 4, 3, True)
    assert first.seed is not None
    assert second.seed is not None
    assert (second.seed - first.seed) % (1 << 63) == 1
    assert first.constraint is not None
    several = CompletionRequest.model_validate({"model": "a", "prompt": [[1, 2], [3]], "n": 2})
    assert [read_request(wire).token_ids for wire in several.wires()] == [(1, 2), (1, 2), (3,), (3,)]  # type: ignore[union-attr]
    assert [wire["max_tokens"] for wire in several.wires()] == [16] * 4


def test_roles_and_parts_are_what_templates_know() -> None:
    asked = ChatRequest.model_validate(
        {
            "model": "a",
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "done"},
            ],
        }
    )
    [wire] = asked.wires()
    assert wire["messages"][0] == {"role": "system", "content": "be brief"}
    assert wire["messages"][1]["content"] == ""
    assert wire["messages"][2]["tool_call_id"] == "1"


def test_fields_that_ask_for_nothing_are_let_through_and_others_not() -> None:
    for name in INERT:
        ChatRequest.model_validate({**CHAT, name: "anything"})
    for name, values in NEUTRAL.items():
        for value in values:
            ChatRequest.model_validate({**CHAT, name: value})
        with pytest.raises(ValidationError, match=name):
            ChatRequest.model_validate({**CHAT, name: "something"})
    ChatRequest.model_validate({**CHAT, "temperature": None, "stop": None, "tools": None})
    with pytest.raises(ValidationError):
        EmbeddingsRequest.model_validate({"model": "a", "input": []})


def test_where_to_listen() -> None:
    assert parse_listen("127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_listen("[::1]:80") == ("::1", 80)
    assert parse_listen(":80") == ("0.0.0.0", 80)
    for wrong in ("", "80", "a:b", "a:99999", "a:-1"):
        with pytest.raises(ResplitError):
            parse_listen(wrong)
    for host, is_local in (("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)):
        assert Listening(host, 1).is_local is is_local

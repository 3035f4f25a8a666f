"""Outputs of a given form through the gateway: JSON by a schema, calls of tools. The model has random weights, so what
it says has the form because it must."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from models.store import Store
from resplit import control
from resplit.replies import RequestError
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.deployment import Stage
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, SETTINGS, Oracle, three_stages
from tests.integration.gateway_fixtures import Front, front

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOOLER = DeploymentName("tooler")
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Bern", "Oslo"]},
                "days": {"type": "integer", "maximum": 9, "minimum": 1},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.place }}{% endfor %}\n{% endfor %}"
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def formed(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Front]:
    manifest = zoo_store.manifest("llama")
    assert manifest.text is not None
    text = manifest.text.model_copy(update={"chat_template": TEMPLATE})
    zoo_store.name("llama-tools", zoo_store.save_manifest(manifest.model_copy(update={"text": text})))
    async with front(tmp_path_factory.mktemp("formed") / "cluster", zoo_store, oracle) as found:
        await found.serving.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        await found.serving.deploy(TOOLER, "llama-tools", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        yield found


def person(text: str | None) -> None:
    assert text is not None
    jsonschema.validate(json.loads(text), PERSON)


async def test_an_answer_meets_its_schema_whole_streamed_and_sampled(formed: Front) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    whole = await formed.openai.chat.completions.create(model=CHAT, messages=HELLO, response_format=form)
    person(whole.choices[0].message.content)
    assert whole.choices[0].finish_reason == "stop"
    streamed = [
        chunk.choices[0].delta.content or ""
        async for chunk in await formed.openai.chat.completions.create(
            model=CHAT, messages=HELLO, response_format=form, stream=True
        )
        if chunk.choices
    ]
    assert "".join(streamed) == whole.choices[0].message.content
    drawn = await asyncio.gather(
        *(
            formed.openai.chat.completions.create(
                model=CHAT, messages=HELLO, response_format=form, temperature=1.5, seed=seed
            )
            for seed in range(8)
        )
    )
    texts = [one.choices[0].message.content for one in drawn]
    for text in texts:
        person(text)
    assert len(set(texts)) > 1


async def test_any_json_object(formed: Front) -> None:
    found = await formed.openai.chat.completions.create(
        model=CHAT, messages=HELLO, response_format={"type": "json_object"}, max_tokens=400, temperature=1.0, seed=3
    )
    text = found.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


async def test_other_constraints_on_the_wire(formed: Front) -> None:
    client = formed.serving.client
    digits = await client.complete(CHAT, PROMPT, constraint={"regex": "[0-9]{3}-[a-f]{2}"})
    assert digits.text[3] == "-"
    assert digits.text[:3].isdigit()
    assert set(digits.text[4:]) <= set("abcdef")
    assert digits.finish_reason == "stop"
    lark = await client.complete(CHAT, PROMPT, constraint={"lark": 'start: "yes" | "no"'})
    assert lark.text in ("yes", "no")
    bad: list[Any] = [
        {"regex": "("},
        {"lark": "start: nothing"},
        {"json_schema": {"type": "unheard of"}},
        {"json_schema": {"type": "string"}, "regex": "a"},
        {},
        {"json_schema": {"$ref": "http://example.org/schema"}},
    ]
    for constraint in bad:
        with pytest.raises(RequestError) as error:
            await client.complete(CHAT, PROMPT, constraint=constraint)
        assert error.value.code == "invalid_request"
        assert error.value.field == "constraint"


async def test_a_constrained_answer_is_the_same_while_the_cut_moves(formed: Front) -> None:
    client = formed.serving.client
    schema = {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 150, "maxItems": 150}
    asked: dict[str, Any] = {"constraint": {"json_schema": schema}, "max_tokens": 900, "temperature": 1.2, "seed": 11}
    calm = await client.complete(CHAT, PROMPT, **asked)
    running = asyncio.create_task(client.complete(CHAT, PROMPT, **asked))
    await asyncio.sleep(0.3)
    moved = (Stage(node=N2, first=0, last=2), Stage(node=N0, first=3, last=5))
    status = await control.place_and_wait(formed.serving.cluster.operator, CHAT, moved, 30.0)
    assert status.current is not None
    found = await running
    assert found.text == calm.text
    assert len(json.loads(found.text)) == 150
    assert found.usage.epoch == status.current.epoch
    await control.place_and_wait(formed.serving.cluster.operator, CHAT, three_stages(N0, N1, N2), 30.0)


async def test_and_when_a_node_dies_under_it(formed: Front) -> None:
    client, cluster = formed.serving.client, formed.serving.cluster
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 100, "maxItems": 100}
    asked: dict[str, Any] = {"constraint": {"json_schema": schema}, "max_tokens": 900, "temperature": 1.2, "seed": 12}
    calm = await client.complete(TOOLER, PROMPT, **asked)
    assert len(json.loads(calm.text)) == 100
    running = asyncio.create_task(client.complete(TOOLER, PROMPT, **asked))
    await formed.serving.until(lambda _: True)
    await asyncio.sleep(0.2)
    await cluster.pause(N1)  # it hangs: what ran over it is computed anew once it is back or replaced
    await asyncio.sleep(1.0)
    await cluster.resume(N1)
    assert (await running).text == calm.text


async def test_a_call_that_must_be_made_is_made(formed: Front) -> None:
    tools: Any = [WEATHER, CLOCK]
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "weather"}}]
    for choice in choices:
        found = await formed.openai.chat.completions.create(
            model=TOOLER,
            messages=HELLO,
            tools=tools,
            tool_choice=choice,
            temperature=1.0,
            seed=1,
        )
        message = found.choices[0].message
        assert found.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("weather", "clock")
        if call.function.name == "weather":
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        if choice != "required":
            assert call.function.name == "weather"


async def test_a_call_is_streamed_and_its_answer_taken(formed: Front) -> None:
    tools: Any = [WEATHER]
    messages: list[Any] = list(HELLO)
    deltas = []
    async for chunk in await formed.openai.chat.completions.create(
        model=TOOLER, messages=messages, tools=tools, tool_choice="required", stream=True
    ):
        deltas += chunk.choices
    calls = [call for choice in deltas for call in choice.delta.tool_calls or []]
    assert [choice.finish_reason for choice in deltas][-1] == "tool_calls"
    [call] = calls
    assert call.function is not None
    assert not any(choice.delta.content for choice in deltas)
    turn = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [turn]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    found = await formed.openai.chat.completions.create(model=TOOLER, messages=messages, tools=tools, max_tokens=8)
    assert found.choices[0].message.content is not None


async def test_tools_that_a_template_does_not_know_are_refused(formed: Front) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await formed.openai.chat.completions.create(model=CHAT, messages=HELLO, tools=[WEATHER])  # type: ignore[list-item]
    assert error.value.param == "tools"
    body = {
        "model": TOOLER,
        "messages": HELLO,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "x"}},
    }
    assert await formed.refused("/v1/chat/completions", body) == (400, "invalid_request", "tool_choice")
    body = {
        "model": CHAT,
        "messages": HELLO,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}},
    }
    assert await formed.refused("/v1/chat/completions", body) == (400, "invalid_request", "response_format")


async def test_nothing_of_it_stands_in_the_trail(formed: Front) -> None:
    await formed.serving.client.complete(CHAT, PROMPT, constraint={"regex": "zebra"})
    await formed.serving.ear.wait(AuditKind.REQUEST_ENDED)
    assert not any("zebra" in event.model_dump_json() for event in formed.serving.ear.heard)

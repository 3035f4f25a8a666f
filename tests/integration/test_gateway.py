"""OpenAI's API and the Open Inference Protocol over HTTP, asked by the clients that people have."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from models.store import Store
from schemas.audit import AuditKind
from tests.integration.cluster_fixtures import CHAT, CNN, EMBED, PROMPT, QUEUED, SLOTS, Oracle
from tests.integration.gateway_fixtures import Front, busy_front

pytestmark = pytest.mark.asyncio(loop_scope="session")

COUNT = 12
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def front(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Front]:
    async with busy_front(tmp_path_factory.mktemp("gateway") / "cluster", zoo_store, oracle) as found:
        yield found


def said(oracle: Oracle, count: int = COUNT) -> str:
    """What the unsplit model says to the prompt."""
    return oracle.text.decode(oracle.tokens(PROMPT, count))


async def test_models_are_deployments(front: Front) -> None:
    listed = [model.id async for model in front.openai.models.list()]
    assert sorted(listed) == sorted([CHAT, EMBED, CNN])
    assert (await front.openai.models.retrieve(CHAT)).owned_by == "resplit"
    with pytest.raises(openai.NotFoundError):
        await front.openai.models.retrieve("nowhere")


async def test_a_completion_is_what_the_unsplit_model_says(front: Front, oracle: Oracle) -> None:
    found = await front.openai.completions.create(
        model=CHAT, prompt=PROMPT, max_tokens=COUNT, extra_body={"ignore_eos": True}
    )
    assert found.choices[0].text == said(oracle)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.completion_tokens, found.usage.prompt_tokens) == (COUNT, len(oracle.text.encode(PROMPT)))
    [detail] = found.usage.model_extra["resplit"]  # type: ignore[index]
    assert [stage["node"] for stage in detail["stages"]] == ["n0", "n1", "n2"]


async def test_several_prompts_and_several_answers(front: Front, oracle: Oracle) -> None:
    ids = oracle.text.encode(PROMPT)
    found = await front.openai.completions.create(
        model=CHAT, prompt=[PROMPT, "the dog"], n=2, max_tokens=4, extra_body={"ignore_eos": True}
    )
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == said(oracle, 4)
    assert texts[2] == texts[3] == oracle.text.decode(oracle.tokens("the dog", 4))
    by_ids = await front.openai.completions.create(
        model=CHAT, prompt=ids, max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert by_ids.choices[0].text == said(oracle, 4)


async def test_a_seed_draws_other_answers_for_other_choices_and_the_same_again(front: Front) -> None:
    async def drawn() -> list[str]:
        found = await front.openai.completions.create(
            model=CHAT, prompt=PROMPT, n=3, seed=7, temperature=2.0, max_tokens=COUNT
        )
        return [choice.text for choice in found.choices]

    first = await drawn()
    assert len(set(first)) == 3
    assert await drawn() == first


async def test_a_chat_whole_and_streamed_is_the_same(front: Front) -> None:
    whole = await front.openai.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=COUNT)
    pieces, finish, usage = [], None, None
    async for chunk in await front.openai.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        max_completion_tokens=COUNT,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.usage is not None:
            usage = chunk.usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


async def test_streams_of_several_answers_are_told_apart(front: Front, oracle: Oracle) -> None:
    body = {"model": CHAT, "prompt": PROMPT, "n": 3, "max_tokens": COUNT, "stream": True, "ignore_eos": True}
    events = await front.events("/v1/completions", body)
    assert events.pop() == "[DONE]"
    for index in range(3):
        mine = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == said(oracle)
        assert [choice["finish_reason"] for choice in mine][-1] == "length"


async def test_log_probabilities_are_the_models(front: Front, oracle: Oracle) -> None:
    found = await front.openai.completions.create(
        model=CHAT, prompt=PROMPT, max_tokens=4, logprobs=3, extra_body={"ignore_eos": True}
    )
    scored = found.choices[0].logprobs
    assert scored is not None
    assert scored.token_logprobs is not None
    for logits, logprob in zip(oracle.logits(PROMPT, 4), scored.token_logprobs, strict=True):
        assert logprob == pytest.approx(-np.log(np.exp(logits - logits.max()).sum()), abs=1e-3)
    assert scored.top_logprobs is not None
    assert all(len(top) == 3 for top in scored.top_logprobs)
    chat = await front.openai.chat.completions.create(
        model=CHAT, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert all(len(one.top_logprobs) == 2 for one in content.content)


async def test_embeddings_as_lists_and_as_bytes(front: Front, oracle: Oracle) -> None:
    texts = ["the quick brown fox", "a lazy dog"]
    forms: list[Any] = ["float", "base64"]
    for form in forms:
        found = await front.openai.embeddings.create(model=EMBED, input=texts, encoding_format=form)
        for text, one in zip(texts, found.data, strict=True):
            raw: Any = one.embedding
            vector = (
                struct.unpack(f"<{len(oracle.vector(text))}f", base64.b64decode(raw)) if isinstance(raw, str) else raw
            )
            assert np.allclose(vector, oracle.vector(text), atol=1e-4)


BAD: list[tuple[str, dict[str, Any], tuple[int, str, str | None]]] = [
    ("chat/completions", {"messages": HELLO}, (400, "invalid_request", "model")),
    ("chat/completions", {"model": "nowhere", "messages": HELLO}, (404, "unknown_deployment", "model")),
    ("chat/completions", {"model": "a.b>", "messages": HELLO}, (404, "unknown_deployment", "model")),
    ("chat/completions", {"model": CHAT, "messages": []}, (400, "invalid_request", "messages")),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "colour": 1}, (400, "invalid_request", "colour")),
    (
        "chat/completions",
        {"model": CHAT, "messages": HELLO, "logit_bias": {"1": 1}},
        (400, "invalid_request", "logit_bias"),
    ),
    ("chat/completions", {"model": CHAT, "messages": HELLO, "n": 99}, (400, "invalid_request", "n")),
    (
        "chat/completions",
        {"model": CHAT, "messages": HELLO, "temperature": 99},
        (400, "invalid_request", "temperature"),
    ),
    (
        "chat/completions",
        {"model": CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        (400, "invalid_request", "messages.0"),
    ),
    ("completions", {"model": CHAT, "prompt": "a " * 3000}, (400, "context_exceeded", "prompt")),
    ("completions", {"model": CHAT, "prompt": [[1], [2]], "n": 9}, (400, "invalid_request", "n")),
    ("completions", {"model": CHAT, "prompt": PROMPT, "deadline_ms": 0}, (504, "deadline_exceeded", "deadline_ms")),
    ("completions", {"model": EMBED, "prompt": PROMPT}, (400, "invalid_request", "prompt")),
    ("embeddings", {"model": EMBED, "input": "a", "dimensions": 3}, (400, "invalid_request", "dimensions")),
    ("embeddings", {"model": CHAT, "input": "a"}, (400, "invalid_request", "input")),
]


@pytest.mark.parametrize(("path", "body", "refusal"), BAD)
async def test_bad_requests_are_refused_by_field(
    front: Front, path: str, body: dict[str, Any], refusal: tuple[int, str, str | None]
) -> None:
    assert await front.refused(f"/v1/{path}", body) == refusal


async def test_what_is_no_json_and_what_is_no_path(front: Front) -> None:
    for data in (b"{", b"[]", b"\xff", b'"a"', b"[" * 100_000):
        found = await front.http.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
        assert found.status_code == 400
        assert found.json()["error"]["type"] == "invalid_request_error"
    missing = await front.http.post("/v1/images/generations", json={})
    assert missing.status_code == 404
    assert missing.json()["error"]["message"]


async def test_a_client_that_leaves_cancels_what_it_asked_for(front: Front) -> None:
    body = {"model": CHAT, "prompt": PROMPT, "max_tokens": 900, "stream": True, "ignore_eos": True}
    async with front.http.stream("POST", "/v1/completions", json=body) as response:
        request = response.headers["x-request-id"]
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                break
    await front.serving.ear.wait(AuditKind.REQUEST_ENDED, request=request, code="cancelled")


async def test_so_does_one_that_waits_for_a_whole_answer(front: Front) -> None:
    before = len(front.serving.ear.heard)
    body = {"model": CHAT, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    asking = asyncio.create_task(front.http.post("/v1/completions", json=body))
    await asyncio.sleep(0.5)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    del front.serving.ear.heard[:before]
    await front.serving.ear.wait(AuditKind.REQUEST_ENDED, code="cancelled")


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(front: Front) -> None:
    fields: dict[str, Any] = {"model": CHAT, "prompt": PROMPT, "max_tokens": 900}
    stream = await front.openai.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
    with pytest.raises(openai.APIError, match="cancelled"):
        async for chunk in stream:
            # Somebody else ends it, who knows its id.
            await front.serving.client.cancel(chunk.id.removeprefix("cmpl-"))
    body = {**fields, "stream": True, "ignore_eos": True, "deadline_ms": 1}
    assert (await front.post("/v1/completions", body))[0] == 429, "what is refused before it began has a status"


async def test_a_full_deployment_says_when_to_come_again(front: Front) -> None:
    body = {"model": CHAT, "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True}
    asked = [asyncio.create_task(front.http.post("/v1/completions", json=body)) for _ in range(SLOTS + QUEUED + 4)]
    try:
        first, _ = await asyncio.wait(asked, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        found = first.pop().result()
        assert found.status_code == 429
        assert 1 <= int(found.headers["retry-after"]) <= 60
        assert found.json()["error"]["code"] == "rate_limit_exceeded"
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_tensors_by_triton_in_both_forms(front: Front, oracle: Oracle) -> None:
    image = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)

    def ask(binary: bool) -> Any:
        with triton.InferenceServerClient(front.url.removeprefix("http://")) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready(CNN)
            assert client.get_server_metadata()["name"] == "resplit"
            assert client.get_model_metadata(CNN)["name"] == CNN
            given = triton.InferInput("image", list(image.shape), "FP32")
            given.set_data_from_numpy(image, binary_data=binary)
            wanted = triton.InferRequestedOutput("classes", binary_data=binary)
            return client.infer(CNN, [given], outputs=[wanted], request_id="mine")

    for binary in (True, False):
        found = await asyncio.to_thread(ask, binary)
        assert found.get_response()["id"] == "mine"
        assert np.allclose(found.as_numpy("classes"), oracle.classes(image), atol=1e-5)


async def test_bad_tensors_are_refused_by_field(front: Front) -> None:
    path = f"/v2/models/{CNN}/infer"
    one: dict[str, Any] = {"name": "image", "shape": [1], "datatype": "FP32", "data": [1.0]}
    bad: list[tuple[Any, str | None]] = [
        ([], "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{**one, "shape": "x"}]}, "inputs.0.shape"),
        ({"inputs": [{**one, "data": [[1.0], 2.0]}]}, "inputs.0.data"),
        ({"inputs": [one, one]}, "inputs.1.name"),
        ({"inputs": [{**one, "parameters": {"binary_data_size": 8}}]}, "inputs.0.parameters"),
        ({"inputs": [one], "outputs": ["classes"]}, "outputs"),
    ]
    for body, field in bad:
        status, plain = await front.post(path, body)
        assert (status, plain["code"], plain["field"]) == (400, "invalid_request", field)
        assert isinstance(plain["error"], str)
    data = json.dumps({"inputs": [one]}).encode()
    for length in ("-1", "x", str(len(data) + 1)):
        found = await front.http.post(path, content=data, headers={"Inference-Header-Content-Length": length})
        assert found.status_code == 400

    def ask() -> None:
        with triton.InferenceServerClient(front.url.removeprefix("http://")) as client:
            given = triton.InferInput("image", [1, 3], "FP32")
            given.set_data_from_numpy(np.zeros((1, 3), np.float32))
            client.infer(CNN, [given])

    with pytest.raises(InferenceServerException):
        await asyncio.to_thread(ask)

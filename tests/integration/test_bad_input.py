"""Requests that make no sense: each ends in one typed error that names the field, and the agents go on."""

import asyncio
import json
from typing import Any

import msgpack
import numpy as np
import pytest
from nats.errors import NoRespondersError

from agent.replies import Replier
from models.store import Store
from resplit import control
from resplit.replies import RequestError
from schemas import subjects
from schemas.base import DeploymentName, RequestId
from schemas.codec import CONTENT_TYPE, JSON, MSGPACK
from schemas.errors import ErrorBody, ErrorCode
from schemas.request import ErrorReply
from tests.integration.cluster_fixtures import CHAT, CNN, CONTEXT, EMBED, PROMPT, Serving, error_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

IMAGE = np.zeros((1, 3, 32, 32), np.float32)
GOOD_IMAGE: dict[str, Any] = {"name": "image", "shape": [1, 3, 32, 32], "datatype": "FP32", "raw": IMAGE.tobytes()}


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({}, "invalid_request", None),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "invalid_request", None),
        ({"prompt": "a", "token_ids": [5]}, "invalid_request", None),
        ({"prompt": 5}, "invalid_request", "prompt"),
        ({"prompt": None, "token_ids": []}, "invalid_request", "token_ids"),
        ({"token_ids": [0, 512]}, "token_out_of_range", "token_ids.1"),
        ({"token_ids": [-1]}, "token_out_of_range", "token_ids.0"),
        ({"token_ids": [1 << 80]}, "token_out_of_range", "token_ids.0"),
        ({"token_ids": ["five"]}, "invalid_request", "token_ids.0"),
        ({"token_ids": [5] * CONTEXT}, "context_exceeded", "token_ids"),
        ({"prompt": "fox " * CONTEXT}, "context_exceeded", "prompt"),
        ({"messages": [{"content": "b"}]}, "invalid_request", "messages.0.role"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": [{"role": "user", "content": ["parts"]}]}, "invalid_request", "messages.0.content"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"prompt": "a", "max_tokens": -7}, "invalid_request", "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, "invalid_request", "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "invalid_request", "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "invalid_request", "temperature"),
        ({"prompt": "a", "top_p": 0}, "invalid_request", "top_p"),
        ({"prompt": "a", "seed": -1}, "invalid_request", "seed"),
        ({"prompt": "a", "seed": 1 << 63}, "invalid_request", "seed"),
        ({"prompt": "a", "stop": ["x"] * 17}, "invalid_request", "stop"),
        ({"prompt": "a", "logprobs": 21}, "invalid_request", "logprobs"),
        ({"prompt": "a", "max_new_tokens": 3}, "invalid_request", "max_new_tokens"),
        ({"prompt": "a", "request_id": "two.tokens"}, "invalid_request", "request_id"),
        ({"prompt": "a", "request_id": "*"}, "invalid_request", "request_id"),
        ({"prompt": "a", "request_id": "x" * 65}, "invalid_request", "request_id"),
        ({"prompt": "a", "deadline_ms": "soon"}, "invalid_request", "deadline_ms"),
        ({"prompt": "a", "deadline_ms": 10**400}, "invalid_request", "deadline_ms"),
        ({"prompt": "a", "max_tokens": 10**400}, "invalid_request", "max_tokens"),
        ({"prompt": "a", "top_k": 10**30}, "invalid_request", "top_k"),
        ({"prompt": "a", "top_k": -1}, "invalid_request", "top_k"),
        ({"input": "a"}, "invalid_request", "input"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}, "invalid_request", "inputs"),
    ],
)
async def test_a_field_that_makes_no_sense_is_named(
    shared: Serving, fields: dict[str, Any], code: str, field: str | None
) -> None:
    assert await shared.refused(CHAT, fields) == (code, field)
    await shared.answers()


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        ({"datatype": "FP64"}, "inputs.0.datatype"),
        ({"datatype": "float32"}, "inputs.0.datatype"),
        ({"datatype": ""}, "inputs.0.datatype"),
        ({"shape": [1, 3, 32]}, "inputs.0.shape"),
        ({"shape": [1, 3, 32, 31]}, "inputs.0.shape"),
        ({"shape": [0, 3, 32, 32]}, "inputs.0.shape"),
        ({"shape": [-1, 3, 32, 32]}, "inputs.0.shape"),
        ({"shape": [1 << 40, 3, 32, 32]}, "inputs.0.raw"),
        ({"shape": [2, 3, 32, 32]}, "inputs.0.raw"),
        ({"raw": b""}, "inputs.0.raw"),
        ({"raw": IMAGE.tobytes() + b"\0"}, "inputs.0.raw"),
        ({"raw": None}, "inputs.0"),
        ({"data": [0.0]}, "inputs.0"),
        ({"raw": None, "data": [0.0]}, "inputs.0.data"),
        ({"raw": None, "data": ["0"] * 3072}, "inputs.0.data"),
        ({"raw": None, "data": [True] * 3072}, "inputs.0.data"),
        ({"raw": None, "data": [None] * 3072}, "inputs.0.data"),
        ({"name": "picture"}, "inputs.0.name"),
        ({"name": None}, "inputs.0.name"),
        ({"colour": 1}, "inputs.0.colour"),
    ],
)
async def test_a_tensor_of_the_wrong_kind_is_named(shared: Serving, tensor: dict[str, Any], field: str) -> None:
    merged = {name: value for name, value in {**GOOD_IMAGE, **tensor}.items() if value is not None}
    assert await shared.refused(CNN, {"inputs": [merged]}, MSGPACK) == ("invalid_request", (
        field if "name" not in tensor or tensor["name"] is not None else "inputs.0.name"
    ))  # fmt: skip
    good = await shared.bus.ask(CNN, {"inputs": [GOOD_IMAGE]}, MSGPACK)
    assert good["outputs"][0]["raw"] == shared.oracle.classes(IMAGE).tobytes()


@pytest.mark.parametrize(
    ("deployment", "request_", "code", "field"),
    [
        (CNN, {"inputs": []}, "invalid_request", "inputs"),
        (CNN, {"inputs": "image"}, "invalid_request", "inputs"),
        (CNN, {"inputs": [GOOD_IMAGE, GOOD_IMAGE]}, "invalid_request", "inputs.1.name"),
        (CNN, {"inputs": [GOOD_IMAGE], "outputs": [{"name": "tops"}]}, "invalid_request", "outputs.0.name"),
        (CNN, {"prompt": "a"}, "invalid_request", "prompt"),
        (CNN, {"input": "a"}, "invalid_request", "input"),
        (EMBED, {"prompt": "a"}, "invalid_request", "prompt"),
        (EMBED, {"input": []}, "invalid_request", "input"),
        (EMBED, {"input": ["a"] * 257}, "invalid_request", "input"),
        (EMBED, {"input": {"text": "a"}}, "invalid_request", "input"),
        (EMBED, {"input": ["a", "fox " * 100]}, "context_exceeded", "input.1"),
    ],
)
async def test_a_request_of_another_kind_of_model_is_refused(
    shared: Serving, deployment: str, request_: dict[str, Any], code: str, field: str
) -> None:
    found, where = await shared.refused(deployment, request_, MSGPACK)
    # pydantic names the branch of a union after the field.
    assert (found, (where or "").split(".str")[0].split(".tuple")[0]) == (code, field)


async def test_a_missing_input_is_named(shared: Serving) -> None:
    ids = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [5, 6]}
    reply = await shared.bus.ask(EMBED, {"inputs": [ids]})
    assert error_of(reply) == ("invalid_request", "inputs")
    assert "attention_mask" in reply["error"]["message"]
    mask = {"name": "attention_mask", "shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]}
    assert error_of(await shared.bus.ask(EMBED, {"inputs": [ids, mask]})) == ("invalid_request", "inputs.1.shape")


async def test_a_token_the_embedder_does_not_have_ends_in_a_typed_error(shared: Serving) -> None:
    inputs = [
        {"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [99_999]},
        {"name": "attention_mask", "shape": [1, 1], "datatype": "INT64", "data": [1]},
    ]
    code, _ = error_of(await shared.bus.ask(EMBED, {"inputs": inputs}))
    assert code == "stage_failed"
    found = await shared.client.embed(EMBED, "six birds")
    np.testing.assert_allclose(found.vectors[0], shared.oracle.vector("six birds"), atol=1e-5)


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b'{"prompt": "a"', JSON),
        (b"\xff\xfe", JSON),
        (b"null", JSON),
        (b"[]", JSON),
        (b'"prompt"', JSON),
        (b"1" * 5000, JSON),
        (b"[" * 100_000, JSON),
        (b'{"prompt": ' + b"[" * 50 + b"]" * 50 + b"}", JSON),
        (b'{"prompt": "\\ud800"}', JSON),
        (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', JSON),
        (b'{"messages": [{"role": "user", "content": "a", "\\udfff": 1}], "stop": "\\udfff", "x": 1}', JSON),
        (b'{"\\ud800": 1, "prompt": "a"}', JSON),
        (b'{"prompt": "a", "request_id": "\\ud800"}', JSON),
        (b"", MSGPACK),
        (b"\xc1", MSGPACK),
        (b"\x90", MSGPACK),
        (b"\x81\xa6prompt", MSGPACK),
        (b"\x81\xa6prompt\xa1\xff", MSGPACK),
        (b"\x81\x01\x02", MSGPACK),
        (b"\x91" * 100_000, MSGPACK),
        (b"\xdd\xff\xff\xff\xff", MSGPACK),
        (msgpack.packb({"prompt": msgpack.Timestamp(1)}), MSGPACK),
        (msgpack.packb({b"prompt": "a"}), MSGPACK),
        (msgpack.packb({b"\xff": "a"}), MSGPACK),
    ],
)
async def test_bytes_that_are_no_request_are_refused(shared: Serving, data: bytes, content_type: str) -> None:
    reply = await shared.bus.say(CHAT, data, content_type)
    assert error_of(reply)[0] == "invalid_request"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-python-pickle", "\u00fc", "a" * 5000])
async def test_an_unknown_content_type_is_named(shared: Serving, content_type: str) -> None:
    reply = await shared.bus.say(CHAT, b"{}", content_type)
    assert error_of(reply) == ("invalid_request", CONTENT_TYPE)


async def test_a_request_without_a_content_type_is_json(shared: Serving) -> None:
    data = json.dumps({"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}).encode()
    reply = await shared.bus.say(CHAT, data, headers={"Other": "header"})
    assert tuple(reply["token_ids"]) == shared.oracle.tokens(PROMPT, 3)
    message = await shared.bus.nats.request(subjects.infer(CHAT), data, 10)
    assert tuple(json.loads(message.data)["token_ids"]) == shared.oracle.tokens(PROMPT, 3)


@pytest.mark.parametrize("parameter", ["charset=utf-8", "charset=\u00fc", "x=" + "y" * 4000])
async def test_parameters_of_a_content_type_are_passed_over(shared: Serving, parameter: str) -> None:
    data = json.dumps({"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}).encode()
    message = await shared.bus.nats.request(
        subjects.infer(CHAT), data, 10, headers={CONTENT_TYPE: f"Application/JSON; {parameter}"}
    )
    assert tuple(json.loads(message.data)["token_ids"]) == shared.oracle.tokens(PROMPT, 3)


async def test_a_header_of_any_bytes_does_no_harm(shared: Serving) -> None:
    for request in ({"prompt": "a", "max_tokens": 2, "stream": True}, {"prompt": "a", "max_tokens": 0}):
        head = b"NATS/1.0\r\nContent-Type: application/json; a=\xff\xfe\r\n\r\n"
        await shared.say_raw(head, json.dumps(request).encode(), "_INBOX.client.raw.x")
    await shared.answers()


async def test_a_bomb_of_empty_arrays_is_refused(shared: Serving) -> None:
    small = b"\xdc\xff\xff" + b"\x90" * 65535
    many = msgpack.packb({"inputs": []})[:-1] + b"\xdc\x00\x0f" + 15 * small
    assert 900_000 < len(many) < 1 << 20
    assert error_of(await shared.bus.say(CNN, many, MSGPACK))[0] == "payload_too_large"
    flat = b"\xdd\x00\x0f\x00\x00" + b"\x90" * 0xF0000
    assert error_of(await shared.bus.say(CNN, flat, MSGPACK))[0] == "invalid_request"
    maps = b"\x81\xa6prompt\xdc\xff\xff" + b"\x80" * 65535
    assert error_of(await shared.bus.say(CNN, maps, MSGPACK))[0] == "invalid_request"
    await shared.answers()


async def test_an_unknown_deployment_is_answered_at_once(shared: Serving) -> None:
    async with asyncio.timeout(2):
        with pytest.raises(NoRespondersError):
            await shared.bus.nats.request(subjects.infer(DeploymentName("nobody")), b"{}", 10)
        with pytest.raises(RequestError) as caught:
            await shared.client.complete("nobody", "a")
    assert caught.value.code == "unknown_deployment"


async def test_a_request_larger_than_the_server_carries_is_refused_by_the_client(shared: Serving) -> None:
    with pytest.raises(RequestError) as caught:
        await shared.client.infer_tensors(CNN, {"image": ([100, 3, 32, 32], "FP32", b"\0" * 1_228_800)})
    assert caught.value.code == "payload_too_large"


async def test_a_reply_larger_than_the_server_carries_becomes_an_error_with_the_requests_id() -> None:
    class Small:
        max_payload = 1000
        sent: tuple[str, bytes] | None = None

        def new_inbox(self) -> str:
            return "bounces"

        async def publish(self, subject: str, data: bytes, **_: Any) -> None:
            self.sent = subject, data

    client = Small()
    reply = Replier(client, lambda _: None).at("inbox", JSON)  # type: ignore[arg-type]
    name = RequestId("too-much")
    await reply.send(ErrorReply(request_id=name, error=ErrorBody(code=ErrorCode.INTERNAL, message="x" * 1000)), None)
    assert client.sent is not None
    subject, data = client.sent
    assert (subject, json.loads(data)["request_id"]) == ("inbox", name)
    assert error_of(json.loads(data)) == ("payload_too_large", None)


async def test_every_refusal_is_audited_without_the_content(shared: Serving) -> None:
    secret = "a-secret-that-must-not-be-kept"
    await shared.bus.ask(CHAT, {"prompt": secret, "max_tokens": 0, "request_id": "audited"})
    await shared.bus.ask(CHAT, {"prompt": secret, "max_tokens": 1})
    await shared.answers()
    assert shared.ear.heard
    assert not any(secret in event.model_dump_json() for event in shared.ear.heard)


async def test_replies_never_go_into_resplits_own_subjects(shared: Serving) -> None:
    heard = await shared.edge.subscribe(subjects.plan(CHAT))
    for data in (b"{", b'{"prompt": "a", "max_tokens": 1}', b'{"prompt": "a", "stream": true, "max_tokens": 1}'):
        await shared.bus.nats.publish(subjects.infer(CHAT), data, subjects.plan(CHAT))
    await shared.answers()
    assert heard.pending_msgs == 0
    await heard.unsubscribe()


@pytest.mark.parametrize("inbox", ["a..b", ">", "x.*", "_INBOX.\u00fc", "$SYS.REQ.SERVER.PING"])
async def test_a_reply_subject_nobody_may_use_does_no_harm(shared: Serving, inbox: str) -> None:
    shared.cluster.provoke(inbox)
    for request in ({"prompt": "a", "max_tokens": 2, "stream": True}, {"prompt": "a", "max_tokens": 0}):
        await shared.say_raw(b"", json.dumps(request).encode(), inbox)
    await shared.answers()


async def test_many_bad_requests_at_once_leave_a_good_one_unharmed(shared: Serving) -> None:
    bad = [shared.bus.say(CHAT, data) for data in [b"{", b"[]", b'{"prompt": 1}'] * 50]
    good = asyncio.create_task(shared.client.complete(CHAT, PROMPT, max_tokens=20, ignore_eos=True))
    replies = await asyncio.gather(*bad)
    answer = await good
    assert answer.token_ids == shared.oracle.tokens(PROMPT, 20)
    assert {reply["error"]["code"] for reply in replies} == {"invalid_request"}


async def test_a_model_without_a_chat_template_refuses_messages(shared: Serving, zoo_store: Store) -> None:
    manifest = zoo_store.manifest("llama")
    assert manifest.text is not None
    bare = manifest.model_copy(update={"text": manifest.text.model_copy(update={"chat_template": None})})
    zoo_store.name("llama-bare", zoo_store.save_manifest(bare))
    await shared.deploy("bare", "llama-bare", stages=1)
    request = {"messages": [{"role": "user", "content": "a"}]}
    assert await shared.refused("bare", request) == ("invalid_request", "messages")
    answer = await shared.client.complete("bare", PROMPT, max_tokens=3, ignore_eos=True)
    assert answer.token_ids == shared.oracle.tokens(PROMPT, 3)
    await control.remove(shared.cluster.operator, DeploymentName("bare"))

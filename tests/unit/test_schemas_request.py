"""What a request may say, and which field is named when it says something else."""

from typing import Any

import pytest

from schemas.errors import ErrorCode, ResplitError
from schemas.request import EmbeddingRequest, TensorRequest, TextRequest, read_request

TENSOR = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}


@pytest.mark.parametrize(
    ("plain", "kind"),
    [
        ({"prompt": "a"}, TextRequest),
        ({"messages": [{"role": "user", "content": "a"}]}, TextRequest),
        ({"token_ids": [1]}, TextRequest),
        ({"input": "a"}, EmbeddingRequest),
        ({"input": ["a", "b"]}, EmbeddingRequest),
        ({"inputs": [TENSOR]}, TensorRequest),
    ],
)
def test_the_input_decides_what_a_request_is(plain: dict[str, Any], kind: type) -> None:
    assert type(read_request(plain)) is kind


def test_an_answer_is_reproducible_and_whole_unless_one_asks_otherwise() -> None:
    request = read_request({"prompt": "a"})
    assert isinstance(request, TextRequest)
    assert (request.temperature, request.max_tokens, request.stream, request.logprobs) == (0.0, 256, False, 0)
    assert (request.top_k, request.top_p, request.min_p, request.seed, request.stop) == (0, 1.0, 0.0, None, ())


@pytest.mark.parametrize(("given", "kept"), [("|", ("|",)), (["|", "x"], ("|", "x")), (None, ())])
def test_one_stop_may_stand_alone(given: object, kept: tuple[str, ...]) -> None:
    request = read_request({"prompt": "a", "stop": given})
    assert isinstance(request, TextRequest)
    assert request.stop == kept


def test_what_openai_clients_send_besides_is_accepted() -> None:
    request = read_request({"model": "gpt", "user": "me", "messages": [{"role": "user", "content": "a", "name": "b"}]})
    assert isinstance(request, TextRequest)


@pytest.mark.parametrize(
    ("plain", "field"),
    [
        ({}, None),
        ({"prompt": "a", "token_ids": [1]}, None),
        ({"prompt": "a", "max_token": 5}, "max_token"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "seed": 1 << 63}, "seed"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "request_id": "a.b"}, "request_id"),
        ({"prompt": "a", "request_id": ""}, "request_id"),
        ({"prompt": "a", "request_id": "a" * 65}, "request_id"),
        ({"token_ids": []}, "token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [TENSOR | {"raw": b""}]}, "inputs.0"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "inputs.0"),
        ({"inputs": [TENSOR], "outputs": [{"nam": "y"}]}, "outputs.0.name"),
    ],
)
def test_a_fault_is_refused_by_the_name_of_its_field(plain: dict[str, Any], field: str | None) -> None:
    with pytest.raises(ResplitError) as refused:
        read_request(plain)
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, field)


@pytest.mark.parametrize("plain", [None, [], "prompt", 3])
def test_what_is_no_object_is_no_request(plain: object) -> None:
    with pytest.raises(ResplitError, match="object"):
        read_request(plain)


def test_a_long_value_is_not_repeated_to_whoever_sent_it() -> None:
    with pytest.raises(ResplitError) as refused:
        read_request({"prompt": "a", "max_tokens": "x" * 10_000})
    assert len(refused.value.message) < 200

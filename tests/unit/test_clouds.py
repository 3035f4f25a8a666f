"""What an agent is told of clouds, what it says to them, and what it takes for an answer."""

import json
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.cloud import cost
from agent.clouds import Endpoint, read_clouds
from agent.cloudwire import Said, can_say, read_said
from resplit.cli import app
from schemas.errors import ErrorCode, ResplitError
from schemas.request import EmbeddingRequest, TextRequest, read_request
from tests.cloud_jobs import embedding_job, generation, tensor_job

GOOD = "[clouds.eu]\nurl = 'https://example.com/v1'\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[clouds.eu]\nurl = 'http://example.com/v1'", "https"),
        ("[clouds.eu]\nurl = 'ftp://example.com/v1'", "https://host/path"),
        ("[clouds.eu]\nurl = 'https://user:key@example.com/v1'", "key_file"),
        ("[clouds.eu]\nurl = 'https://example.com/v1?key=1'", "key_file"),
        (f"{GOOD}prise_request = 1", "price_request"),
        (f"{GOOD}price_prompt = -1", "price_prompt"),
        (f"{GOOD}timeout_s = 0", "timeout_s"),
        (f"{GOOD}in_flight = 0", "in_flight"),
        (f"{GOOD}key_file = 'none'", "clouds.eu.key_file"),
        (f"{GOOD}ca_file = 'none'", "clouds.eu.ca_file"),
        ("[clouds.'No Name']\nurl = 'https://example.com'", "No Name"),
        ("clouds = 3", "clouds"),
        ("[clouds.eu", "TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "clouds.toml"
    path.write_text(text)
    with pytest.raises(ResplitError) as caught:
        read_clouds(path)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert named in caught.value.message and str(path) in caught.value.message


def test_the_command_refuses_it_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "clouds.toml"
    path.write_text(f"{GOOD}prise_request = 1")
    found = CliRunner().invoke(app, ["agent", "n0", "--keys", str(tmp_path), "--clouds", str(path)])
    assert found.exit_code != 0
    assert "price_request" in re.sub(r"\s+", " ", found.stderr)
    assert CliRunner().invoke(app, ["agent", "n0", "--keys", str(tmp_path), "--clouds", "none.toml"]).exit_code != 0


def test_a_key_stays_with_whoever_may_read_it(tmp_path: Path) -> None:
    path, key = tmp_path / "clouds.toml", tmp_path / "eu.key"
    path.write_text(f"{GOOD}key_file = 'eu.key'")
    key.write_text("sk-1\n")
    key.chmod(0o640)
    with pytest.raises(ResplitError, match="chmod 600"):
        read_clouds(path)
    key.chmod(0o600)
    found = read_clouds(path)["eu"]
    assert (found.key, found.tls) == ("sk-1", None)
    for wrong in ("", "two keys", "k" * 5000, "schlüssel"):
        key.write_text(wrong)
        with pytest.raises(ResplitError, match="one key"):
            read_clouds(path)


def test_certificates_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "clouds.toml"
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None:
        pytest.skip("this machine has no certificates to take for an example")
    path.write_text(f"{GOOD}ca_file = '{paths.cafile}'")
    assert read_clouds(path)["eu"].tls is not None


def test_what_a_cloud_has_no_word_for_is_not_put_to_it() -> None:
    plain = TextRequest(prompt="a")
    assert can_say(plain, "openai")
    assert not can_say(plain, "oip")
    for more in ({"logprobs": 1}, {"ignore_eos": True}, {"top_k": 2}, {"min_p": 0.1}):
        assert not can_say(TextRequest(prompt="a", **more), "openai")
    assert can_say(EmbeddingRequest(input="a"), "openai")
    tensors = read_request({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}]})
    assert can_say(tensors, "oip") and not can_say(tensors, "openai")


COMPLETION: dict[str, Any] = {"choices": [{"text": "b", "finish_reason": "length"}], "usage": {"prompt_tokens": 2}}


def test_an_answer_is_read_with_what_it_counts() -> None:
    said = read_said(json.dumps(COMPLETION).encode(), generation())
    assert (said.text, said.finish_reason, said.prompt_tokens, said.completion_tokens) == ("b", "length", 2, 0)
    chat = {"choices": [{"message": {"role": "assistant", "content": "c"}, "finish_reason": "stop"}], "id": "1"}
    assert read_said(json.dumps(chat).encode(), generation()).text == "c"
    endpoint = Endpoint(url="https://example.com", price_request=1.0, price_prompt=2.0, price_output=3.0)
    assert cost(endpoint, Said("a", prompt_tokens=1_000_000, completion_tokens=2_000_000)) == 9.0


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"finish_reason": "stop"}]}',
        b'{"choices": [{"finish_reason": "stop", "text": 3}]}',
        b'{"choices": [{"finish_reason": "content_filter", "text": "a"}]}',
        b'{"choices": [{"finish_reason": "tool_calls", "message": {"content": null}}]}',
        b'{"choices": [{"finish_reason": "stop", "text": "a"}], "usage": {"prompt_tokens": -1}}',
        b'{"choices": [{"finish_reason": "stop", "text": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"choices": [' + b"[]," * 300_000 + b"[]]}",
    ],
)
def test_nonsense_is_a_typed_error(answer: bytes) -> None:
    with pytest.raises(ResplitError) as caught:
        read_said(answer, generation())
    assert caught.value.code is ErrorCode.CLOUD_FAILED
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "vectors",
    [
        [],
        [{"index": 0, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [1.0, 2.0]}, {"index": 0, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [1.0, 2.0]}, {"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0, 2.0]}, {"index": 1, "embedding": [1.0, float("nan")]}],
        [{"index": 0, "embedding": [1.0, 2.0, 3.0]}, {"index": 1, "embedding": [1.0, 2.0, 3.0]}],
    ],
)
def test_vectors_are_as_many_and_as_long_as_the_models(vectors: list[dict[str, Any]]) -> None:
    with pytest.raises(ResplitError) as caught:
        read_said(json.dumps({"data": vectors}).encode(), embedding_job(["a", "b"], size=2))
    assert caught.value.code is ErrorCode.CLOUD_FAILED


def test_vectors_are_told_by_their_index() -> None:
    data = [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1.0, 2.0]}]
    said = read_said(json.dumps({"data": data}).encode(), embedding_job(["a", "b"], size=2))
    assert said.vectors == ((1.0, 2.0), (3.0, 4.0))


def test_tensors_are_those_of_the_model() -> None:
    good = {"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.5]}
    said = read_said(json.dumps({"outputs": [good]}).encode(), tensor_job())
    assert said.tensors is not None
    assert said.tensors["y"].tolist() == [[1.0, 2.5]]
    for wrong in ({"name": "z"}, {"shape": [2, 1]}, {"shape": [1, 3]}, {"datatype": "INT64"}, {"data": [1.0]}):
        with pytest.raises(ResplitError) as caught:
            read_said(json.dumps({"outputs": [{**good, **wrong}]}).encode(), tensor_job())
        assert caught.value.code is ErrorCode.CLOUD_FAILED

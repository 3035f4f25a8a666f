"""One canonical encoding; bounded decoding of whatever comes."""

import json
import tracemalloc
from collections.abc import Callable

import msgpack
import pytest

from schemas.base import DeploymentName, Digest, NodeId
from schemas.codec import JSON, MAX_DEPTH, MAX_ELEMENTS, MSGPACK, decode, decode_as, decode_plain, encode, encode_as
from schemas.deployment import Deployment, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.framing import unpack as unpack_frame
from schemas.journal import unpack_records

DEPLOYMENT = Deployment(
    name=DeploymentName("adder"), model=Digest("a" * 64), placement=(Stage(node=NodeId("n0"), first=0, last=3),)
)


def test_the_canonical_bytes_are_compact_in_field_order_and_without_nulls() -> None:
    assert encode(DEPLOYMENT) == (
        b'{"name":"adder","model":"' + b"a" * 64 + b'","settings":{"chunk_tokens":128,"context_tokens":2048,'
        b'"max_sequences":32,"max_queued":64,"pipeline_depth":1,"recovery":"identical","batch_invariant":true},'
        b'"placement":[{"node":"n0","first":0,"last":3}],"sealed":false,"on_demand":false}'
    )


@pytest.mark.parametrize("content_type", [JSON, MSGPACK, f"{MSGPACK}; v=1", "Application/JSON"])
def test_a_value_survives_the_way_out_and_in(content_type: str) -> None:
    assert decode_as(Deployment, encode_as(DEPLOYMENT, content_type), content_type, "deployment") == DEPLOYMENT


def test_the_canonical_bytes_are_a_fixed_point() -> None:
    assert encode(decode(Deployment, encode(DEPLOYMENT), "deployment")) == encode(DEPLOYMENT)


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (b"{", JSON),
        (b"\xff", JSON),
        (b"", JSON),
        (b"[" * 100_000, JSON),
        (b"\xc1", MSGPACK),
        (b"\xdd\xff\xff\xff\xff", MSGPACK),  # an array of four billion that never comes
        (b"\x81\x01\x02", MSGPACK),  # a key that is no string
        (msgpack.packb(msgpack.ExtType(1, b"x")), MSGPACK),
        (b"{}", "text/plain"),
    ],
)
def test_what_is_malformed_is_refused_as_invalid(data: bytes, content_type: str) -> None:
    with pytest.raises(ResplitError) as refused:
        decode_plain(data, content_type, "request")
    assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_a_value_nested_too_deep_is_refused() -> None:
    deep = json.dumps(_nested(MAX_DEPTH + 1)).encode()
    with pytest.raises(ResplitError, match=f"deeper than {MAX_DEPTH}"):
        decode_plain(deep, JSON, "request")
    assert decode_plain(json.dumps(_nested(MAX_DEPTH - 1)).encode(), JSON, "request") == _nested(MAX_DEPTH - 1)


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
def test_too_many_elements_are_refused_however_small_they_are(content_type: str) -> None:
    many: list[list[int]] = [[]] * (MAX_ELEMENTS // 2)
    plain = {"a": many, "b": many}
    data = json.dumps(plain).encode() if content_type == JSON else msgpack.packb(plain)
    with pytest.raises(ResplitError) as refused:
        decode_plain(data, content_type, "request")
    assert refused.value.code is ErrorCode.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize("read", [lambda data: decode_plain(data, MSGPACK, "request"), unpack_frame, unpack_records])
def test_headers_that_announce_what_does_not_follow_take_no_memory(read: Callable[[bytes], object]) -> None:
    headers = (b"\xdd" + (2_000).to_bytes(4, "big")) * 500
    data = len(headers).to_bytes(4, "little") + headers if read is unpack_frame else headers
    tracemalloc.start(1)
    with pytest.raises(ResplitError):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_an_error_names_the_field_at_fault() -> None:
    data = encode(DEPLOYMENT).replace(b'"last":3', b'"last":-3')
    with pytest.raises(ResplitError) as refused:
        decode(Deployment, data, "deployment")
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, "placement.0.last")
    assert "-3" in refused.value.message


def test_a_field_nobody_declared_is_refused() -> None:
    with pytest.raises(ResplitError) as refused:
        decode(Deployment, encode(DEPLOYMENT)[:-1] + b',"colour":"red"}', "deployment")
    assert refused.value.field == "colour"


def _nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value

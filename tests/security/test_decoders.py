"""Whatever comes from the network, a decoder answers with a value or with its own error, in memory that is bounded.

The short form runs with every other test; `make fuzz` gives it as long as it is told to.
"""

import ast
import ctypes
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import schemas
from tests.security.decoders import NOT_FROM_THE_NETWORK, WHERE, Decoder, decoders
from tests.security.mutating import damaged
from tests.security.recording import Recording

ROOT = Path(schemas.__file__).parents[1]
PACKAGES = ("schemas", "bus", "agent", "orchestrator", "resplit", "models", "profiler")
READERS = {
    *("unpackb", "Unpacker", "read_flat", "loads", "model_validate", "model_validate_json", "frombuffer", "from_bytes"),
    *("fromhex", "b64decode", "unpack_from", "load_der_x509_certificate", "load_pem_x509_certificate"),
}
"""What turns bytes into something else, and can be told what to by whoever wrote them."""
ROOM = 2 << 20
"""What a decoder may take whatever the message: a buffer of msgpack, caches, the exception itself."""
MEGABYTE = 1 << 20
RESIDENT_ROOM = 16 << 20
EXAMPLES = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")), deadline=None, suppress_health_check=list(HealthCheck)
)
"""Of each decoder."""


@pytest.fixture(scope="module")
def known(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    return decoders(recording, tmp_path_factory.mktemp("decoders"))


def reading_places() -> Iterator[str]:
    """`file:function` of every call in production that reads bytes."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield from _places(ast.parse(file.read_text()), file.relative_to(ROOT).as_posix(), ())


def _places(node: ast.AST, file: str, inside: tuple[str, ...]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if isinstance(child, ast.Call):
            called = child.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            is_struct = name == "unpack" and isinstance(called, ast.Attribute) and ast.unparse(called.value).isupper()
            if name in READERS or is_struct:
                yield f"{file}:{'.'.join(inside)}"
        yield from _places(child, file, (*inside, child.name) if named else inside)  # type: ignore[attr-defined]


def test_every_place_that_reads_bytes_has_its_decoder_here_or_a_reason(known: dict[str, Decoder]) -> None:
    assert {*WHERE, *NOT_FROM_THE_NETWORK} == {*reading_places()}
    missing = {name for name in WHERE.values() if not any(one.startswith(name) for one in known)}
    assert not missing


def test_what_really_travels_is_read(known: dict[str, Decoder]) -> None:
    """So that what follows gets further than the first check of each."""
    read = {name for name, decoder in known.items() if all(_is_taken(decoder, data) for data in decoder.samples)}
    # A kind of value that nobody sent has an empty object for a sample: its mutations are all that there is.
    assert {name for name in known if not name.startswith("value")} - read == {
        "answer of the stream",
        "reply of the orchestrator",
    }
    sent = {"SealedEvent", "PlanEvent", "EventSection", "Receipt", "Heartbeat", "Capacity", "Hosting", "AuditEvent"}
    assert {f"value {kind}" for kind in sent | {"DeployRequest"}} <= read


def _is_taken(decoder: Decoder, data: bytes) -> bool:
    try:
        decoder.read(data)
    except decoder.refuses_with:
        return False
    return True


leaves = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8) | st.binary()
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=20,
)
lengths = st.sampled_from([0, 1, 2, 15, 16, 255, 65535, 1 << 20, (1 << 32) - 1])


@st.composite
def hostile_msgpack(draw: st.DrawFn) -> bytes:
    """Headers that announce more than follows, nested as deep as one likes, around anything at all."""
    heads = [
        *(bytes([first]) + draw(lengths).to_bytes(4, "big") for first in (0xDD, 0xDF, 0xDB, 0xC6, 0xC9)),
        *(b"\x91", b"\x81", b"\x94", b"\xc7\xff\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc1"),
    ]
    deep = draw(st.sampled_from(heads)) * draw(st.sampled_from([1, 1, 2, 5, 40, 600, 3000]))
    return deep + b"".join(msgpack.packb(value) for value in draw(st.lists(anything, max_size=3)))


@st.composite
def hostile_json(draw: st.DrawFn) -> bytes:
    deep = draw(st.sampled_from([0, 0, 1, 40, 5000]))
    inner = draw(
        st.sampled_from([b"1e999", b"-1e999", b"NaN", b"1" * 5000, b'"\\ud800"', b'"\xff"', b"{}", b'{"a":1,"a":2}'])
        | anything.map(lambda value: json.dumps(value, default=repr, skipkeys=True).encode())
    )
    opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b"[[],", b"]")]))
    return opening * deep + inner + closing * deep


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """A real JSON message in which one value is anything."""
    try:
        value = json.loads(data)
    except ValueError:  # what is sealed may begin like one
        return data
    if not isinstance(value, dict) or not value:
        return data
    name = draw(st.sampled_from(sorted(value)))
    odd: list[Any] = [1e999, -1, 1 << 70, "x" * 300, [[]] * 100, {"a": {}}, None, True, "2026-01-01T00:00:00+99:99"]
    value[name] = draw(st.sampled_from(odd) | anything)
    return json.dumps(value, default=repr, skipkeys=True).encode()


def hostile(decoder: Decoder) -> st.SearchStrategy[bytes]:
    """Bytes for one decoder: from nowhere, made of its real ones, or with its framing around hostile content."""
    whole = st.binary(max_size=200) | hostile_msgpack() | hostile_json()
    real = st.sampled_from(decoder.samples)
    framed = whole.map(lambda body: len(body).to_bytes(4, "little") + body)
    mutated = real.filter(bool).flatmap(damaged)
    is_json = decoder.samples[0][:1] == b"{"
    return whole | framed | mutated | mutated | (real.flatmap(changed) if is_json else mutated)


def test_whatever_comes_is_a_value_or_the_decoder_s_own_error_within_its_memory(known: dict[str, Decoder]) -> None:
    for name, decoder in known.items():
        fuzz(name, decoder)


def fuzz(name: str, decoder: Decoder) -> None:
    @EXAMPLES
    @given(data=hostile(decoder))
    def answers(data: bytes) -> None:
        tracemalloc.start(1)
        try:
            decoder.read(data)
        except decoder.refuses_with:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak <= ROOM + decoder.fold * len(data), name

    answers()


def megabytes() -> dict[str, bytes]:
    """Messages as large as the bus carries, each with as much as possible to make of each byte."""
    count = MEGABYTE - 16
    announced = b"\xdd" + (count - 5).to_bytes(4, "big")
    return {
        "empty arrays": announced + b"\x90" * (count - 5),
        "arrays of four": b"\x94" * (count // 5) + b"\xc0" * (count - count // 5),
        "announced arrays": (announced * 1000) + b"\x90" * (count - 5000),
        "JSON objects": b'{"placement":[' + b",".join([b"{}"] * (count // 3 - 20)) + b"]}",
        "JSON messages": b'{"messages":[' + b",".join([b"{}"] * (count // 3 - 20)) + b"]}",
        "JSON inputs": b'{"inputs":[' + b",".join([b"{}"] * 199_000) + b"]}",
        "JSON plans": b'{"draining":[' + b",".join([b"{}"] * (count // 3 - 20)) + b"]}",
    }


WORST = {
    ("value DeployRequest", "JSON objects"),
    ("request", "JSON messages"),
    ("request", "JSON inputs"),
    ("request msgpack", "empty arrays"),
    ("frame", "announced arrays"),
    ("envelope", "arrays of four"),
    ("piece of a frame", "empty arrays"),
    ("value PlanEvent", "JSON plans"),
}
"""What anybody may send, and one thing that only an orchestrator may."""


def test_a_hostile_megabyte_takes_no_more_than_its_fold(known: dict[str, Decoder]) -> None:
    """Of the process as the kernel sees it, for what is compiled is not traced."""
    messages = megabytes()
    for name, what in sorted(WORST):
        decoder, data = known[name], messages[what]
        for framed in (data, len(data[4:]).to_bytes(4, "little") + data[4:]):
            grown = resident_growth(lambda: _is_taken(decoder, framed))  # noqa: B023 (called at once)
            assert grown <= RESIDENT_ROOM + decoder.fold * len(framed), (name, what)


def resident_growth(action: Callable[[], object]) -> int:
    """Bytes by which the process grew at most while `action` ran."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10

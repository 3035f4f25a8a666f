"""Whatever is done to a sealed file, a wrap or a letter: it is refused, and nothing that was not sealed comes out."""

import hashlib
import io

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bus.hpke import block_info, unwrap, wrap
from bus.letters import About, open_letter, seal_letter
from models.sealing import FileContext, open_file, seal_file
from schemas.base import DeploymentName, Digest, NodeId
from schemas.errors import ErrorCode, ResplitError

CHUNK = 1024
HEADER = 20
STRIDE = CHUNK + 16
KEY = bytes(range(32))
MODEL = Digest("a" * 64)

sizes = st.integers(0, 5 * CHUNK) | st.sampled_from([0, CHUNK, 2 * CHUNK, 4 * CHUNK])


def plain_of(size: int) -> bytes:
    return hashlib.shake_128(b"plain").digest(size)


def context_of(plain: bytes) -> FileContext:
    return FileContext(MODEL, 2, Digest(hashlib.sha256(plain).hexdigest()))


def seal(plain: bytes) -> bytes:
    target = io.BytesIO()
    seal_file(io.BytesIO(plain), target, KEY, context_of(plain), CHUNK)
    return target.getvalue()


def mutations(sealed: bytes) -> st.SearchStrategy[bytes]:
    """Other bytes made of these: bits flipped, cut off, added, chunks left out, doubled, swapped, from elsewhere."""
    chunks = [sealed[start : start + STRIDE] for start in range(HEADER, len(sealed), STRIDE)]
    foreign = seal(plain_of(2 * CHUNK + 5))
    strangers = [foreign[start : start + STRIDE] for start in range(HEADER, len(foreign), STRIDE)]
    bits = st.sets(st.integers(0, 8 * len(sealed) - 1), min_size=1, max_size=3)
    return (
        bits.map(lambda places: flipped(sealed, places))
        | st.integers(0, len(sealed) - 1).map(lambda length: sealed[:length])
        | st.integers(0, len(chunks)).map(lambda count: sealed[: HEADER + count * STRIDE])
        | st.binary(min_size=1, max_size=2 * STRIDE).map(lambda more: sealed + more)
        | st.lists(st.sampled_from([*chunks, *strangers]), max_size=len(chunks) + 1).map(
            lambda parts: sealed[:HEADER] + b"".join(parts)
        )
        | st.permutations(chunks).map(lambda parts: sealed[:HEADER] + b"".join(parts))
        | st.just(foreign[:HEADER] + sealed[HEADER:])
    )


def flipped(data: bytes, places: set[int]) -> bytes:
    altered = bytearray(data)
    for place in places:
        altered[place // 8] ^= 1 << place % 8
    return bytes(altered)


@settings(deadline=None)
@given(st.data(), sizes)
def test_a_mutated_file_is_refused_and_gives_only_chunks_that_were_sealed_there(data: st.DataObject, size: int) -> None:
    plain = plain_of(size)
    sealed = seal(plain)
    mutant = data.draw(mutations(sealed))
    assume(mutant != sealed)
    came = b""
    with pytest.raises(ResplitError) as refused:
        for part in open_file(io.BytesIO(mutant), KEY, context_of(plain)):
            came += part
    assert refused.value.code is ErrorCode.CORRUPT_FILE
    assert len(came) % CHUNK == 0
    assert plain.startswith(came)


@settings(deadline=None)
@given(
    sizes,
    st.binary(min_size=32, max_size=32),
    st.builds(FileContext, st.just(MODEL) | st.just(Digest("b" * 64)), st.integers(0, 3), st.just(Digest("c" * 64)))
    | st.none(),
)
def test_another_key_or_context_opens_nothing(size: int, key: bytes, other: FileContext | None) -> None:
    plain = plain_of(size)
    context = other or context_of(plain)
    assume(key != KEY or other is not None)
    parts = open_file(io.BytesIO(seal(plain)), key, context)
    with pytest.raises(ResplitError) as refused:
        next(parts)
    assert refused.value.code is ErrorCode.CORRUPT_FILE


ME = X25519PrivateKey.from_private_bytes(b"\1" * 32)
NODE = NodeId("n0")
INFO = block_info("home", MODEL, 2, NODE)
WRAPPED = wrap(KEY, ME.public_key(), INFO)
ABOUT = About("journal", DeploymentName("chat"), "r1", "n1")
LETTER = seal_letter(b"owed", {NODE: ME.public_key(), NodeId("n2"): ME.public_key()}, ABOUT)
names = st.text("az09-_.: é", min_size=1, max_size=5)


@given(st.sets(st.integers(0, 8 * len(WRAPPED) - 1), min_size=1, max_size=4))
def test_a_mutated_wrap_opens_nothing(places: set[int]) -> None:
    with pytest.raises(ResplitError) as refused:
        unwrap(flipped(WRAPPED, places), ME, INFO)
    assert refused.value.code is ErrorCode.BAD_SIGNATURE


@given(names, names, st.integers(0, 3), names)
def test_different_purposes_never_look_alike(cluster: str, model: str, block: int, node: str) -> None:
    info = block_info(cluster, Digest(model), block, NodeId(node))
    assert info.decode().split("|")[1:] == [cluster, model, str(block), node]


@given(
    st.sets(st.integers(0, 8 * len(LETTER) - 1), min_size=1, max_size=4).map(lambda places: flipped(LETTER, places))
    | st.integers(0, len(LETTER) - 1).map(lambda length: LETTER[:length])
    | st.binary(min_size=1, max_size=600).map(lambda more: LETTER + more)
    | st.binary(max_size=600)
)
def test_a_mutated_letter_is_refused(mutant: bytes) -> None:
    with pytest.raises(ResplitError) as refused:
        open_letter(mutant, NODE, ME, ABOUT)
    assert refused.value.code in {ErrorCode.BAD_SIGNATURE, ErrorCode.INVALID_REQUEST}

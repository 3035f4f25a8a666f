"""A sealed file opens to its own bytes, for whoever has its block's key and knows what it is, or not at all."""

import hashlib
import io
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models.sealing import CHUNK_BYTES, FileContext, open_file, seal_file
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef

CHUNK = 1024
HEADER = 20
STRIDE = CHUNK + 16
MODEL = Digest("a" * 64)
KEY = bytes(range(32))
PLAIN = bytes(i * i % 251 for i in range(3 * CHUNK + 7))


def context_of(plain: bytes, block: int = 3) -> FileContext:
    return FileContext(MODEL, block, Digest(hashlib.sha256(plain).hexdigest()))


def seal(plain: bytes, chunk_bytes: int = CHUNK) -> tuple[bytes, BlobRef]:
    target = io.BytesIO()
    described = seal_file(io.BytesIO(plain), target, KEY, context_of(plain), chunk_bytes)
    return target.getvalue(), described


def seal_by_hand(plain: bytes, context: FileContext, *more: bytes) -> bytes:
    """The format, from its description alone; `more` are chunks after those of the plaintext."""
    header = b"RESPLSF\x01" + struct.pack("<I", CHUNK) + b"8 bytes."
    about = f"resplit.sealed-file.v1|{context.model}|{context.block}|{context.file}".encode()
    cipher = AESGCM(HKDF(hashes.SHA256(), 32, None, about).derive(KEY))
    parts = [plain[i : i + CHUNK] for i in range(0, len(plain), CHUNK)] + list(more)
    sealed = header
    for i, part in enumerate(parts):
        word = struct.pack("<I", i + (2**31 if i == len(parts) - 1 else 0))
        sealed += cipher.encrypt(b"8 bytes." + word, part, word + header + about)
    return sealed


def opened(sealed: bytes, key: bytes = KEY, context: FileContext | None = None) -> bytes:
    return b"".join(open_file(io.BytesIO(sealed), key, context or context_of(PLAIN)))


def refused(act: Callable[[], object]) -> ResplitError:
    with pytest.raises(ResplitError) as error:
        act()
    return error.value


SEALED, DESCRIBED = seal(PLAIN)
FILE = context_of(PLAIN).file


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_what_was_sealed_opens_to_itself(size: int) -> None:
    plain = PLAIN[:size]
    sealed, _ = seal(plain)
    assert opened(sealed, context=context_of(plain)) == plain
    assert len(sealed) == HEADER + size + 16 * max(1, -(-size // CHUNK))


def test_the_seal_tells_which_blob_it_wrote() -> None:
    assert (DESCRIBED.digest, DESCRIBED.size_bytes) == (hashlib.sha256(SEALED).hexdigest(), len(SEALED))


def test_the_format_is_the_one_described() -> None:
    assert opened(seal_by_hand(PLAIN, context_of(PLAIN))) == PLAIN


def test_a_file_has_one_division_into_chunks() -> None:
    whole = PLAIN[: 2 * CHUNK]
    assert opened(seal_by_hand(whole, context_of(whole)), context=context_of(whole)) == whole
    error = refused(lambda: opened(seal_by_hand(whole, context_of(whole), b""), context=context_of(whole)))
    assert error.code is ErrorCode.CORRUPT_FILE


def test_no_piece_of_the_plaintext_is_in_the_sealed_form() -> None:
    assert not any(PLAIN[i : i + 8] in SEALED for i in range(0, len(PLAIN) - 8))


def test_a_file_sealed_twice_has_two_sealed_forms_that_share_no_chunk() -> None:
    again, _ = seal(PLAIN)
    first, second = (
        {form[start : start + STRIDE] for start in range(HEADER, len(form), STRIDE)} for form in (SEALED, again)
    )
    assert len(first) == len(second) == 4
    assert not first & second


def test_sealing_begins_where_the_source_stands_and_works_from_a_file_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"skipped" + PLAIN)
    with (tmp_path / "weights").open("rb") as source, (tmp_path / "sealed").open("xb") as target:
        source.seek(len(b"skipped"))
        described = seal_file(source, target, KEY, context_of(PLAIN))
    assert (tmp_path / "sealed").stat().st_size == described.size_bytes
    with (tmp_path / "sealed").open("rb") as sealed:
        assert b"".join(open_file(sealed, KEY, context_of(PLAIN))) == PLAIN


def test_bytes_that_are_not_those_named_are_not_sealed() -> None:
    error = refused(lambda: seal_file(io.BytesIO(PLAIN), io.BytesIO(), KEY, context_of(PLAIN[1:])))
    assert error.code is ErrorCode.CORRUPT_FILE
    assert hashlib.sha256(PLAIN).hexdigest() in error.message


@pytest.mark.parametrize(
    "context",
    [
        FileContext(Digest("b" * 64), 3, FILE),
        FileContext(MODEL, 4, FILE),
        FileContext(MODEL, 3, Digest("b" * 64)),
    ],
)
def test_a_file_passes_as_none_of_another_model_block_or_name(context: FileContext) -> None:
    error = refused(lambda: opened(SEALED, context=context))
    assert (error.code, "chunk 0 of 4" in error.message) == (ErrorCode.CORRUPT_FILE, True)


def test_another_block_s_key_opens_nothing() -> None:
    assert refused(lambda: opened(SEALED, bytes(32))).code is ErrorCode.CORRUPT_FILE


def test_what_was_cut_off_moved_doubled_or_appended_does_not_open() -> None:
    chunks = [SEALED[start : start + STRIDE] for start in range(HEADER, len(SEALED), STRIDE)]
    a, b, c, last = chunks
    for mutant in (
        [a, b, c],
        [a],
        [a, b, last],
        [b, c, last],
        [b, a, c, last],
        [a, b, c, c, last],
        [a, b, c, last[:-1]],
        [a, b, c, last, b"\0"],
        [a, b, c, last[:16]],
        [last],
        [],
    ):
        with pytest.raises(ResplitError) as error:
            opened(SEALED[:HEADER] + b"".join(mutant))
        assert error.value.code is ErrorCode.CORRUPT_FILE


def test_chunks_before_a_damaged_one_come_and_none_from_it_on() -> None:
    damaged = bytearray(SEALED)
    damaged[HEADER + 2 * STRIDE] ^= 1
    parts = open_file(io.BytesIO(damaged), KEY, context_of(PLAIN))
    assert next(parts) + next(parts) == PLAIN[: 2 * CHUNK]
    error = refused(lambda: next(parts))
    assert FILE in error.message
    assert "chunk 2 of 4" in error.message
    assert list(parts) == []


def test_a_file_that_is_cut_off_while_it_is_read_is_refused() -> None:
    source = io.BytesIO(SEALED)
    parts = open_file(source, KEY, context_of(PLAIN))
    next(parts)
    source.truncate(HEADER + STRIDE + 5)
    assert "ends within chunk 1 of 4" in refused(lambda: next(parts)).message


def test_whoever_has_the_key_still_cannot_pass_other_bytes_under_a_file_s_name() -> None:
    forged = seal_by_hand(PLAIN[::-1], context_of(PLAIN))
    came = []

    def read() -> None:
        for part in open_file(io.BytesIO(forged), KEY, context_of(PLAIN)):
            came.append(part)  # what came before the error is the claim.

    assert refused(read).code is ErrorCode.CORRUPT_FILE
    assert b"".join(came) == PLAIN[::-1][: 3 * CHUNK], "the last chunk waits for the digest"


@pytest.mark.parametrize(
    ("place", "flipped", "says"),
    [
        (0, 0xFF, "does not begin"),
        (7, 3, "version 2"),
        (8, 0xFF, "does not authenticate|its end is missing"),
        (11, 0x7F, "claims chunks of 2130707456"),
        (12, 0xFF, "does not authenticate"),
    ],
)
def test_a_header_that_was_altered_is_refused(place: int, flipped: int, says: str) -> None:
    altered = bytearray(SEALED)
    altered[place] ^= flipped
    with pytest.raises(ResplitError, match=says) as error:
        opened(bytes(altered))
    assert error.value.code is ErrorCode.CORRUPT_FILE


def test_keys_chunks_and_contexts_that_there_are_not_are_refused() -> None:
    for act, field in (
        (lambda: seal_file(io.BytesIO(), io.BytesIO(), KEY[:16], context_of(b"")), "block_key"),
        (lambda: opened(SEALED, KEY + b"x"), "block_key"),
        (lambda: seal_file(io.BytesIO(), io.BytesIO(), KEY, context_of(b""), 1 << 25), "chunk_bytes"),
        (lambda: FileContext(Digest("x|y"), 0, MODEL), "model"),
        (lambda: FileContext(MODEL, 0, Digest("A" * 64)), "file"),
        (lambda: FileContext(MODEL, -1, MODEL), "block"),
    ):
        error = refused(act)
        assert (error.code, error.field) == (ErrorCode.INVALID_REQUEST, field)


def test_a_large_file_is_sealed_and_read_in_the_memory_of_a_few_chunks(tmp_path: Path) -> None:
    plain = bytes(16 * CHUNK_BYTES)
    (tmp_path / "weights").write_bytes(plain)
    context = context_of(plain)
    del plain
    tracemalloc.start()
    try:
        with (tmp_path / "weights").open("rb") as source, (tmp_path / "sealed").open("xb") as target:
            seal_file(source, target, KEY, context)
        with (tmp_path / "sealed").open("rb") as sealed:
            assert sum(len(part) for part in open_file(sealed, KEY, context)) == 16 * CHUNK_BYTES
        assert tracemalloc.get_traced_memory()[1] < 5 * CHUNK_BYTES
    finally:
        tracemalloc.stop()

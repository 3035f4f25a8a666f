"""Sealed files: weights and graphs as they lie in the registry and travel, opened by the hosts of one block alone.

    header    "RESPLSF", version (1 byte), bytes in a chunk (uint32), random prefix (8 bytes); 20 bytes, little-endian
    chunks    AES-256-GCM of each chunk of the file, every one but the last of the same length; each with its tag

The nonce of chunk i is the prefix and a 32-bit word: i, and in the top bit whether it is the last chunk. This is
STREAM (Hoang, Reyhanitabar, Rogaway and Vizar, CRYPTO 2015): a chunk that is altered, left out, doubled or moved does
not authenticate, nor does a file that was cut off or made longer. Associated data are that word, the header, and
what the file is (`FileContext`), so a file never passes as another one.

One key opens a block; each file has a key of its own, derived from it by HKDF-SHA256 with the file's context. Hosts
hold blocks, so they are given one wrap for each block and not one for each file; and since no two files share a key,
the random prefix only has to tell apart repeated sealings of one file. A block has hundreds of files, and under one
key two equal prefixes among them would give both plaintexts away.

AES-GCM does not commit to its key: one ciphertext can be made to open under two keys. So whoever reads a whole file
also learns that its bytes hash to the name that the model's manifest gives them.

Chunks are 1 MiB: measured, files open equally fast (0.9 GB a second and core, most of it for SHA-256) with 64 KiB to
4 MiB, and slower beyond, where a chunk leaves the processor's caches before it is hashed.
"""

import hashlib
import re
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from schemas.base import DIGEST_PATTERN, Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef

MAGIC = b"RESPLSF"
VERSION = 1
HEADER = struct.Struct("<7sBI8s")
WORD = struct.Struct("<I")
PREFIX_BYTES = 8
TAG_BYTES = 16
KEY_BYTES = 32
CHUNK_BYTES = 1 << 20
CHUNK_BYTES_MIN = 1 << 10
CHUNK_BYTES_MAX = 1 << 24
"""A header that was tampered with makes its reader allocate no more than this."""
LAST = 1 << 31
"""The bit of the word that marks the last chunk."""


@dataclass(frozen=True)
class FileContext:
    """What a sealed file is: bound to its bytes, so that it opens as nothing else."""

    model: Digest
    """Of the manifest of the model in the open (`Manifest.unsealed`)."""
    block: int
    file: Digest
    """Of the plaintext: the name by which the model's manifest and its graphs know the file."""

    def __post_init__(self) -> None:
        for field, digest in (("model", self.model), ("file", self.file)):
            if not re.fullmatch(DIGEST_PATTERN, digest):
                message = f"{digest!r} is not a SHA-256 in lower-case hexadecimal"
                raise ResplitError(ErrorCode.INVALID_REQUEST, message, field)
        if self.block < 0:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"no block has the index {self.block}", "block")

    def encode(self) -> bytes:
        """The bytes that keys are derived with and chunks are authenticated with."""
        return f"resplit.sealed-file.v1|{self.model}|{self.block}|{self.file}".encode()


def seal_file(
    source: BufferedIOBase, target: BinaryIO, block_key: bytes, context: FileContext, chunk_bytes: int = CHUNK_BYTES
) -> BlobRef:
    """Write the sealed form of `source`, from where it stands to its end, to `target`, and say which blob that is;
    three chunks are in memory.

    Raises `ResplitError(CORRUPT_FILE)` when the bytes read are not those that `context` names: what was written by
    then is to be thrown away. Raises INVALID_REQUEST for a key or a chunk of a length that there is not.
    """
    if not CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX:
        message = f"chunks of {chunk_bytes} bytes; choose {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "chunk_bytes")
    prefix = secrets.token_bytes(PREFIX_BYTES)
    header = HEADER.pack(MAGIC, VERSION, chunk_bytes, prefix)
    cipher = _cipher(block_key, context)
    about = header + context.encode()
    plain_hash, sealed_hash = hashlib.sha256(), hashlib.sha256(header)
    sealed_bytes = target.write(header)
    here, ahead = bytearray(chunk_bytes), bytearray(chunk_bytes)
    out = memoryview(bytearray(chunk_bytes + TAG_BYTES))
    length, index, more = _fill(source, memoryview(here)), 0, 1
    while more:
        # Only the chunk after it tells whether this one is the last.
        more = _fill(source, memoryview(ahead))
        if index >= LAST:
            message = f"file {context.file} has more than {LAST} chunks of {chunk_bytes} bytes; use larger chunks"
            raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message, "chunk_bytes")
        word = WORD.pack(index | (0 if more else LAST))
        plain, sealed = memoryview(here)[:length], out[: length + TAG_BYTES]
        cipher.encrypt_into(prefix + word, plain, word + about, sealed)
        plain_hash.update(plain)
        sealed_hash.update(sealed)
        sealed_bytes += target.write(sealed)
        here, ahead, length, index = ahead, here, more, index + 1
    _check_digest(plain_hash.hexdigest(), context)
    return BlobRef(digest=Digest(sealed_hash.hexdigest()), size_bytes=sealed_bytes)


def open_file(source: BufferedIOBase, block_key: bytes, context: FileContext) -> Iterator[bytes]:
    """The plaintext, a chunk at a time; no byte of a chunk that did not authenticate.

    The last chunk comes only when all of the plaintext has the digest that `context` names: whoever got it has the
    whole file. Raises `ResplitError(CORRUPT_FILE)` naming the file and the chunk; earlier chunks are then of no use.
    `source` must be seekable, and is read from its beginning.
    """
    sealed = _Sealed(source, block_key, context)
    hasher = hashlib.sha256()
    for index in range(sealed.chunks):
        plain = sealed.chunk(index)
        hasher.update(plain)
        if index == sealed.chunks - 1:
            _check_digest(hasher.hexdigest(), context)
        yield plain


class _Sealed:
    """A sealed file whose header was read; the chunks of it, one at a time."""

    def __init__(self, source: BufferedIOBase, block_key: bytes, context: FileContext) -> None:
        self._source = source
        self._context = context
        size_bytes = source.seek(0, 2)
        source.seek(0)
        header = source.read(HEADER.size)
        if len(header) < HEADER.size:
            raise self._corrupt(f"has {size_bytes} bytes, fewer than a header")
        magic, version, self.chunk_bytes, self._prefix = HEADER.unpack(header)
        if magic != MAGIC:
            raise self._corrupt("is not one: it does not begin like one")
        if version != VERSION:
            raise self._corrupt(f"is of version {version}, and this program reads version {VERSION}")
        if not CHUNK_BYTES_MIN <= self.chunk_bytes <= CHUNK_BYTES_MAX:
            raise self._corrupt(f"claims chunks of {self.chunk_bytes} bytes")
        stride = self.chunk_bytes + TAG_BYTES
        whole, rest = divmod(size_bytes - HEADER.size, stride)
        # Only an empty file has an empty chunk: every file has one sealed form of a given chunk size.
        if rest < TAG_BYTES if not whole else 0 < rest <= TAG_BYTES:
            raise self._corrupt(f"has {size_bytes} bytes, which no sealed file has: its end is missing")
        self.chunks = whole + (rest > 0)
        if self.chunks > LAST:
            raise self._corrupt(f"has {self.chunks} chunks, over the limit of {LAST}")
        self.plain_bytes = size_bytes - HEADER.size - self.chunks * TAG_BYTES
        self._cipher = _cipher(block_key, context)
        self._about = header + context.encode()
        self._room = memoryview(bytearray(min(stride, size_bytes - HEADER.size)))
        self._plain = memoryview(bytearray(min(self.chunk_bytes, self.plain_bytes)))

    def chunk(self, index: int) -> bytes:
        """The plaintext of one chunk."""
        part = self._plain[: min(self.chunk_bytes, self.plain_bytes - index * self.chunk_bytes)]
        sealed, word = self._read(index), self._word(index)
        try:
            # The calls that return bytes keep the interpreter to themselves; this one and `encrypt_into` let it go.
            self._cipher.decrypt_into(self._prefix + word, sealed, word + self._about, part)
        except InvalidTag as error:
            raise self._refused(index) from error
        return bytes(part)

    def _read(self, index: int) -> memoryview:
        stride = self.chunk_bytes + TAG_BYTES
        begin = index * self.chunk_bytes
        part = self._room[: min(self.chunk_bytes, self.plain_bytes - begin) + TAG_BYTES]
        self._source.seek(HEADER.size + index * stride)
        if _fill(self._source, part) < len(part):
            raise self._corrupt(f"ends within chunk {index} of {self.chunks}, counted from 0")
        return part

    def _word(self, index: int) -> bytes:
        return WORD.pack(index | (LAST if index == self.chunks - 1 else 0))

    def _refused(self, index: int) -> ResplitError:
        return self._corrupt(
            f"does not authenticate in chunk {index} of {self.chunks}, counted from 0: it was altered or cut, or the "
            "key is that of another block or model"
        )

    def _corrupt(self, why: str) -> ResplitError:
        named = f"the sealed form of file {self._context.file} of block {self._context.block}"
        return ResplitError(ErrorCode.CORRUPT_FILE, f"{named} {why}; fetch it again")


def _cipher(block_key: bytes, context: FileContext) -> AESGCM:
    """AES-256-GCM under the key of one file."""
    if len(block_key) != KEY_BYTES:
        message = f"a block's key has {KEY_BYTES} bytes, not {len(block_key)}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "block_key")
    return AESGCM(HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=context.encode()).derive(block_key))


def _check_digest(found: str, context: FileContext) -> None:
    if found != context.file:
        message = f"file {context.file} of block {context.block} hashes to {found}; import the model again"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message)


def _fill(source: BufferedIOBase, room: memoryview) -> int:
    """Read until `room` is full or the source has ended; the bytes read."""
    filled = 0
    while filled < len(room):
        read = source.readinto(room[filled:])
        if not read:
            break
        filled += read
    return filled

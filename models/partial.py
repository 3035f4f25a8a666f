"""Files on their way into a store: written under another name, and published whole.

    partial/<sha256>          a download: pieces at their offsets, in any order
    partial/<sha256>.pieces   which of them came, each noted once it is written: (offset, length), uint64, little-endian
    partial/<random>          everything else, and a download that another process makes as well

A download that was interrupted, even by the end of its process, goes on where it was. What the machine's sudden end
made of it shows in the hash: then it begins anew.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef

PIECE = struct.Struct("<QQ")


class Receiver:
    """One download: pieces at offsets in any order, then `commit`, which checks and publishes them.

    Leaving the `with` block without a commit keeps what came, for the next one that wants the same blob.
    """

    def __init__(self, target: Path, size_bytes: int, folder: Path) -> None:
        self._target = target
        self._size_bytes = size_bytes
        self._temporary, self._file = _claimed(folder, target.name)
        self._notes = self._temporary.with_name(f"{self._temporary.name}.pieces").open("a+b")
        self._came = self._read_notes()

    def has(self, offset: int, length: int) -> bool:
        """Whether exactly this piece came already, in an earlier attempt or in this one."""
        return (offset, length) in self._came

    def write(self, offset: int, piece: bytes | memoryview) -> None:
        """Write a piece. Raises CORRUPT_FILE when it reaches outside the announced size."""
        if offset < 0 or offset + len(piece) > self._size_bytes:
            raise ResplitError(
                ErrorCode.CORRUPT_FILE,
                f"a piece of blob {self._target.name} reaches byte {offset + len(piece)} of {self._size_bytes}; "
                "fetch it from another peer",
            )
        try:
            self._file.seek(offset)
            self._file.write(piece)
            self._file.flush()  # before it is noted: what a process that is killed leaves is true
            self._notes.write(PIECE.pack(offset, len(piece)))
            self._notes.flush()
        except OSError:  # a disk that is full is not to be kept full
            self._forget()
            for file in (self._file, self._notes):
                with contextlib.suppress(OSError):  # what it could not write it tries to write once more
                    file.close()
            raise
        self._came.add((offset, len(piece)))

    def commit(self) -> BlobRef:
        """Hash what arrived and publish it. Raises CORRUPT_FILE and deletes it when it is not the blob."""
        self._file.truncate(self._size_bytes)
        with self._temporary.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._target.name:
            self._came.clear()
            self.close()
            raise ResplitError(
                ErrorCode.CORRUPT_FILE,
                f"what arrived as blob {self._target.name} hashes to {found}; fetch it from another peer",
            )
        publish(self._file, self._temporary, self._target)
        self._came.clear()
        self.close()
        return BlobRef(digest=Digest(found), size_bytes=self._size_bytes)

    def close(self) -> None:
        """Leave the download as it is; nothing stays of one of which nothing came, or that another process makes."""
        if not self._came or self._temporary.name != self._target.name:
            self._forget()
        self._notes.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self) -> None:
        for file, path in ((self._file, self._temporary), (self._notes, Path(self._notes.name))):
            if not file.closed and _is_at(file, path):
                path.unlink()
        self._came.clear()

    def _read_notes(self) -> set[tuple[int, int]]:
        self._notes.seek(0)
        data = self._notes.read()
        whole = len(data) - len(data) % PIECE.size
        came = {(offset, length) for offset, length in PIECE.iter_unpack(data[:whole])}
        size = os.fstat(self._file.fileno()).st_size
        if any(offset + length > size for offset, length in came):
            came.clear()  # they are of a file that is gone
        self._notes.truncate(whole if came else 0)
        return came


def publish(file: BinaryIO, temporary: Path, target: Path) -> None:
    """Move a written file to its name so that a crash leaves either nothing or all of it."""
    file.flush()
    os.fsync(file.fileno())
    temporary.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _claimed(folder: Path, name: str) -> tuple[Path, BinaryIO]:
    """A file that no other process writes to: `folder/name` as it was left, or a new one of a random name."""
    path = folder / name
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: PTH123, SIM115 (what is there stays)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have published it between the two steps: then this is a blob, and not to be written to.
        if _is_at(file, path):
            return path, file
    file.close()
    path = folder / secrets.token_hex(16)
    return path, path.open("xb")


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

"""Files by their hash, from whoever holds them.

A holder subscribes to one subject per file, all holders of a file in one queue group: the server then
picks a holder for every piece, spreads the load over them, and answers *no responders* at once where
nobody has the file. Pieces are pulled, a window at a time, so a slow reader never drowns.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgpack
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

from schemas import subjects
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.flat import read_flat

PIECE_BYTES = 512 << 10
"""Measured: chunks of 256 KiB to 1 MiB carry the most per second through nats-server."""
OFFSET_MAX = (1 << 63) - 1
"""What a system call takes."""
WINDOW = 8
"""Pieces asked for at once."""
PICKED_S = 0.5
"""How long the holder that the server picked may take. One that hangs would be picked again and again, so after this
every holder is asked at once, and the first answer counts."""
ALL_TIMEOUTS_S = (2.0, 8.0, 20.0)
"""How long each attempt at all of them may take: a slow link gets its time in the end."""
UNKNOWN_BYTES_MAX = 64 << 20
"""No file whose size is not known beforehand (a manifest) is larger."""


@dataclass
class Asking:
    """How holders are asked, over all files of a plan."""

    all_at_once: bool = False
    """A holder that the server picked kept still: it would be picked for other files as well."""


class Download(Protocol):
    """Where pieces of one file go; nothing appears under the file's name before `commit` found its hash right.
    `has`: whether an earlier attempt, which was interrupted, got that piece."""

    def has(self, offset: int, length: int, /) -> bool: ...
    def write(self, offset: int, piece: bytes, /) -> None: ...
    def commit(self) -> object: ...


class Files(Protocol):
    """A content-addressed store, as far as a transfer needs one."""

    def has(self, digest: Digest, /) -> bool: ...
    def path(self, digest: Digest, /) -> Path: ...
    def receive(self, digest: Digest, size: int, /) -> AbstractContextManager[Download]: ...


class BlobServer:
    """Answers requests for pieces of the files it was told to offer."""

    def __init__(self, client: Client, files: Files) -> None:
        self._client = client
        self._files = files
        self._offered: dict[Digest, tuple[Subscription, Subscription]] = {}

    async def offer(self, digests: Iterable[Digest]) -> None:
        """Serve these files too, from now on."""
        for digest in digests:
            if digest not in self._offered and self._files.has(digest):
                self._offered[digest] = (
                    await self._client.subscribe(subjects.blob(digest), subjects.BLOB_QUEUE, cb=self._answer),
                    await self._client.subscribe(subjects.blob_of_all(digest), cb=self._answer),
                )

    async def withdraw(self, digests: Iterable[Digest]) -> None:
        """Stop serving these files."""
        for digest in digests:
            for subscription in self._offered.pop(digest, ()):
                await subscription.unsubscribe()

    async def _answer(self, request: Msg) -> None:
        digest = Digest(request.subject.removesuffix(".all").rsplit(".", 1)[-1])
        try:
            if not request.data:
                await request.respond(self._files.path(digest).stat().st_size.to_bytes(8, "little"))
                return
            offset, length = piece_wanted(request.data)
            piece = await asyncio.to_thread(_read_piece, self._files.path(digest), offset, min(length, PIECE_BYTES))
        except (OSError, ResplitError):
            piece = b""  # the reader treats a short piece as a failed holder and asks again
        await request.respond(piece)


def piece_wanted(data: bytes) -> tuple[int, int]:
    """Offset and length of the piece of a file that is asked for; raises `ResplitError(INVALID_REQUEST)`."""
    match read_flat(data, 2):
        case [int(offset), int(length)] if 0 <= offset <= OFFSET_MAX and length >= 0:
            return offset, length
        case _:
            raise ResplitError(ErrorCode.INVALID_REQUEST, "a piece has an offset and a length, packed as msgpack")


async def size_of(client: Client, digest: Digest) -> int:
    """How many bytes a file has, by the word of a holder; `fetch` then checks its hash."""
    size = int.from_bytes(await _pull(client, digest, b"", 8, Asking()), "little")
    if size > UNKNOWN_BYTES_MAX:
        raise ResplitError(ErrorCode.MISSING_BLOB, f"file {digest} is said to have {size} bytes: that is no manifest")
    return size


async def fetch(
    client: Client,
    files: Files,
    digest: Digest,
    size: int,
    on_bytes: Callable[[int], None] = lambda _: None,
    asking: Asking | None = None,
    window: AbstractAsyncContextManager[object] | None = None,
) -> None:
    """Bring one file into `files`, hash-checked, if it is not there already; one that was interrupted goes on.
    `asking` is shared by fetches that follow.

    Each piece is asked for inside `window`, which by default lets `WINDOW` of them through at once.

    Raises `ResplitError(MISSING_BLOB)` when no node has it or holders stay silent, and `CORRUPT_FILE`
    when what came does not have the hash that was asked for.
    """
    if files.has(digest):
        return
    gate = asyncio.Semaphore(WINDOW) if window is None else window
    how = Asking() if asking is None else asking
    with files.receive(digest, size) as download:

        async def piece(offset: int) -> None:
            length = min(PIECE_BYTES, size - offset)
            if download.has(offset, length):
                return
            async with gate:
                download.write(offset, await _pull(client, digest, msgpack.packb([offset, length]), length, how))
                on_bytes(length)

        try:
            async with asyncio.TaskGroup() as group:
                for offset in range(0, size, PIECE_BYTES):
                    group.create_task(piece(offset))
        except* ResplitError as errors:
            raise errors.exceptions[0] from None  # one failed piece is one error to the caller
        await asyncio.to_thread(download.commit)


async def _pull(client: Client, digest: Digest, request: bytes, length: int, asking: Asking) -> bytes:
    """An answer of `length` bytes, from whichever holder gives one."""
    if not asking.all_at_once:
        answer = await _ask(client, subjects.blob(digest), request, PICKED_S)
        if len(answer) == length:
            return answer
        asking.all_at_once = True
    for timeout_s in ALL_TIMEOUTS_S:
        answer = await _ask(client, subjects.blob_of_all(digest), request, timeout_s)
        if len(answer) == length:
            return answer
    raise ResplitError(ErrorCode.MISSING_BLOB, f"the holders of file {digest} do not answer with its bytes")


async def _ask(client: Client, subject: str, request: bytes, timeout_s: float) -> bytes:
    try:
        reply = await client.request(subject, request, timeout=timeout_s)
    except NoRespondersError as error:
        raise ResplitError(ErrorCode.MISSING_BLOB, f"no node offers a file that is asked for: {subject}") from error
    except NatsTimeoutError:
        return b""
    return bytes(reply.data)


def _read_piece(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)

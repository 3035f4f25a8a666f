"""Files come from all who hold them, from whoever answers, and once interrupted from where they were."""

import asyncio
import random
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from bus.blobs import PIECE_BYTES, Asking, BlobServer, fetch
from bus.connection import connect, settle
from models.store import Store
from schemas import subjects
from schemas.base import Digest

pytestmark = pytest.mark.asyncio

FILES = 24


async def test_a_holder_that_hangs_is_waited_for_once_however_many_files_a_plan_has(
    nats_url: str, tmp_path: Path
) -> None:
    theirs, mine = Store(tmp_path / "theirs"), Store(tmp_path / "mine")
    files = [theirs.put(bytes([i]) * 1000) for i in range(FILES)]
    holder, hung, reader = [await connect(nats_url, name) for name in ("holder", "hung", "reader")]
    picked: list[str] = []

    async def keep_still(message: Msg) -> None:
        picked.append(message.subject)

    await BlobServer(holder, theirs).offer([file.digest for file in files])
    for file in files:  # as a stopped process looks to the server: it holds the file and takes the question
        await hung.subscribe(subjects.blob(file.digest), subjects.BLOB_QUEUE, cb=keep_still)
    await asyncio.gather(settle(holder), settle(hung))

    asking = Asking()
    for file in files:
        await fetch(reader, mine, file.digest, file.size_bytes, asking=asking)

    assert all(mine.read(file.digest) == theirs.read(file.digest) for file in files)
    assert len(picked) == 1
    for client in (holder, hung, reader):
        await client.close()


class Counting(Store):
    """A holder's store that counts how often a file is read for others."""

    answers = 0

    def path(self, digest: Digest) -> Path:
        self.answers += 1
        return super().path(digest)


async def test_the_pieces_of_one_file_come_from_all_who_hold_it_at_once(nats_url: str, tmp_path: Path) -> None:
    whole = random.Random(1).randbytes(40 * PIECE_BYTES)
    holders = [Counting(tmp_path / f"holder{i}") for i in range(3)]
    clients = [await connect(nats_url, f"holder{i}") for i in range(3)]
    for client, store in zip(clients, holders, strict=True):
        file = store.put(whole)
        await BlobServer(client, store).offer([file.digest])
        await settle(client)
        store.answers = 0
    mine, reader = Store(tmp_path / "mine"), await connect(nats_url, "reader")
    await fetch(reader, mine, file.digest, file.size_bytes)
    assert mine.read(file.digest) == whole
    assert sum(store.answers for store in holders) == 40
    assert all(store.answers for store in holders)
    for client in (*clients, reader):
        await client.close()


async def test_a_file_that_was_interrupted_is_asked_for_from_where_it_was(nats_url: str, tmp_path: Path) -> None:
    theirs, mine = Store(tmp_path / "theirs"), Store(tmp_path / "mine")
    file = theirs.put(random.Random(0).randbytes(12 * PIECE_BYTES + 7))
    holder, reader = [await connect(nats_url, name) for name in ("holder", "reader")]
    asked: list[bytes] = []

    async def note(message: Msg) -> None:
        asked.append(message.data)

    watching = await holder.subscribe(subjects.blob(file.digest), cb=note)
    await BlobServer(holder, theirs).offer([file.digest])
    await settle(holder)
    came: list[int] = []
    enough = asyncio.Event()

    def count(size: int) -> None:
        came.append(size)
        if len(came) == 5:
            enough.set()

    fetching = asyncio.create_task(fetch(reader, mine, file.digest, file.size_bytes, count))
    await enough.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    before = len(came)
    await settle(holder)
    asked.clear()
    await fetch(reader, mine, file.digest, file.size_bytes, count)
    await settle(holder)
    assert mine.read(file.digest) == theirs.read(file.digest)
    assert 5 <= before < 13
    assert (len(asked), sum(came)) == (13 - before, file.size_bytes)
    await watching.unsubscribe()
    for client in (holder, reader):
        await client.close()

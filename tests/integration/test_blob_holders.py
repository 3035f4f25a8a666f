"""Files come from whoever answers, even where the broker goes on picking a holder that hangs."""

import asyncio
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from bus.blobs import Asking, BlobServer, fetch
from bus.connection import connect, settle
from models.store import Store
from schemas import subjects

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

"""The files of blocks: fetched by hash from whoever has them, verified, and offered to whoever needs them.

Used from the event loop. A file that is here is hashed once per process; one that is damaged is replaced.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager

from nats.aio.client import Client

from bus.blobs import Asking, BlobServer, fetch, size_of
from models.session import verify_again, verify_once
from models.store import Store
from schemas.base import Digest
from schemas.capacity import StoredBlocks
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Manifest

FETCHES_MAX = 4
"""Files fetched at once; each already asks for several pieces at once."""

Gate = AbstractAsyncContextManager[object]
"""Held while one piece of a file is asked for; it may be entered many times at once."""


class Fetcher:
    """Brings the files of blocks into this node's store."""

    def __init__(self, client: Client, store: Store, server: BlobServer, on_corrupt: Callable[[Digest], None]) -> None:
        """`on_corrupt` hears, from any thread, of damaged files before they are replaced."""
        self._client = client
        self._store = store
        self._server = server
        self._on_corrupt = on_corrupt
        self._known: dict[Digest, Manifest] = {}
        """Models that this process was asked about."""
        self._on_disk: tuple[StoredBlocks, ...] | None = None

    async def manifest(self, model: Digest) -> tuple[Manifest, int]:
        """A model's manifest, and how many bytes had to be fetched for it; raises what `bus.blobs.fetch` raises."""
        fetched = 0
        if not self._store.has(model):
            fetched = await size_of(self._client, model)
            await fetch(self._client, self._store, model, fetched)
        if model not in self._known:
            self._known[model] = self._store.manifest(model)
            self._on_disk = None
        return self._known[model], fetched

    async def missing(self, refs: Iterable[BlobRef], again: Collection[Digest] = ()) -> list[BlobRef]:
        """Those of these files that are not here, or not whole; those in `again` are hashed though they once were."""
        return await asyncio.to_thread(lambda: [ref for ref in refs if not self._is_sound(ref, ref.digest in again)])

    async def bring(self, refs: Collection[BlobRef], gate: Gate | None = None) -> int:
        """Fetch these files, several at once, or one after the other and a piece at a time through `gate`; their
        bytes. Raises `ResplitError` as `bus.blobs.fetch` does; what had come by then stays."""
        files = asyncio.Semaphore(FETCHES_MAX if gate is None else 1)
        asking = Asking()
        # What was here once and is not any more is still offered, and this node would ask itself for it.
        await self._server.withdraw([ref.digest for ref in refs])

        async def one(ref: BlobRef) -> None:
            async with files:
                await fetch(self._client, self._store, ref.digest, ref.size_bytes, asking=asking, window=gate)

        try:
            async with asyncio.TaskGroup() as group:
                for ref in refs:
                    group.create_task(one(ref))
        except* ResplitError as errors:
            raise errors.exceptions[0] from None
        finally:
            self._on_disk = None
        return sum(ref.size_bytes for ref in refs)

    async def offer(self, digests: Iterable[Digest]) -> None:
        """Serve these files to others as well."""
        await self._server.offer(digests)

    def known(self, model: Digest) -> Manifest | None:
        """The manifest of a model that this process was asked about."""
        return self._known.get(model)

    async def forget(self, digests: Collection[Digest]) -> None:
        """These files were removed: offer them no more."""
        self._on_disk = None
        await self._server.withdraw(digests)

    def on_disk(self) -> tuple[StoredBlocks, ...]:
        """The blocks whose files are all here, of every model that this process was asked about."""
        if self._on_disk is None:
            self._on_disk = tuple(
                StoredBlocks.of(
                    model, [i for i in range(len(manifest.blocks)) if self._has(block_files(manifest, [i]))]
                )
                for model, manifest in sorted(self._known.items())
            )
        return self._on_disk

    def _has(self, refs: Iterable[BlobRef]) -> bool:
        return all(self._store.has(ref.digest) for ref in refs)

    def _is_sound(self, ref: BlobRef, again: bool) -> bool:
        """Whether the file is here and whole; one that is damaged is reported and removed, to be fetched anew."""
        if not self._store.has(ref.digest):
            return False
        try:
            (verify_again if again else verify_once)(self._store, ref)
        except ResplitError as error:
            if error.code is not ErrorCode.CORRUPT_FILE:
                raise
            self._on_corrupt(ref.digest)
            self._store.path(ref.digest).unlink(missing_ok=True)
            return False
        return True


def block_files(manifest: Manifest, blocks: Iterable[int]) -> tuple[BlobRef, ...]:
    """Graphs and weights of these blocks, each file once; of a sealed model, their sealed forms."""
    files = {ref.digest: ref for i in blocks for ref in manifest.blocks[i].stored}
    return tuple(files.values())


def tokenizer_file(manifest: Manifest) -> tuple[BlobRef, ...]:
    """What a node needs besides blocks to be the source of a route."""
    if manifest.text is None:
        return ()
    return (manifest.text.tokenizer,)

"""The room that files of models have on this node's disk, and who gives it up for whom.

What plans in force need stays. For a plan everything else goes, the oldest first, if it must; for what is staged ahead
of need goes what nothing needs, or what is wanted less.
"""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence

from agent.fetching import Fetcher, block_files, tokenizer_file
from bus.audit import AuditTrail
from models.store import Store
from schemas.audit import AuditKind
from schemas.base import Digest, NodeId
from schemas.capacity import StoredBlocks
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef
from schemas.section import SeenPlan

RESERVE_SHARE = 0.05
"""Share of the disk that staging leaves free, for plans in force and whatever else writes there."""


class Disk:
    """A node's store, and what it may grow to."""

    def __init__(
        self,
        node: NodeId,
        store: Store,
        files: Fetcher,
        plans: Callable[[], Sequence[SeenPlan]],
        audit: Callable[[], AuditTrail],
        limit_bytes: int | None = None,
    ) -> None:
        """`plans`: every plan that this node has a part in; `limit_bytes`: what the operator lets files of models take,
        where that is less than the disk has."""
        self._node = node
        self._store = store
        self._files = files
        self._plans = plans
        self._audit = audit
        self._limit = limit_bytes

    def room(self) -> tuple[int, int]:
        """Bytes that files of models may still take, none kept back, and what they may take at most, once all that is
        not needed has gone."""
        free, taken = shutil.disk_usage(self._store.blobs_folder).free, self._taken()
        if self._limit is None:
            return free, free + taken
        return min(free, max(0, self._limit - taken)), min(free + taken, self._limit)

    async def room_for_plan(self, refs: Collection[BlobRef]) -> None:
        """Make room for files that a plan needs. Raises MODEL_TOO_LARGE with the bytes short where there is none."""
        short = await self._short(refs, (), 0)
        if short > 0:
            size = sum(ref.size_bytes for ref in refs)
            message = f"the disk of {self._node} has no room for {size} bytes of the plan's files, {short} short"
            raise ResplitError(ErrorCode.MODEL_TOO_LARGE, f"{message}; give it more, or place fewer blocks there")

    async def room_ahead(self, refs: Collection[BlobRef], wanted: Iterable[StoredBlocks]) -> bool:
        """Whether there is room, beside the reserve, for files that no plan needs yet; what is not `wanted` went for
        them if it had to."""
        total = shutil.disk_usage(self._store.blobs_folder).total if self._limit is None else self._limit
        return await self._short(refs, wanted, int(RESERVE_SHARE * total)) <= 0

    async def _short(self, refs: Collection[BlobRef], wanted: Iterable[StoredBlocks], reserve_bytes: int) -> int:
        """How many bytes are missing once all has gone that may."""
        needs = sum(ref.size_bytes for ref in refs) + reserve_bytes
        short = needs - self.room()[0]
        if short <= 0:
            return 0
        keep = self._needed(wanted) | {ref.digest for ref in refs}
        swept = await asyncio.to_thread(self._store.make_room, short, keep)
        if swept:
            await self._files.forget(swept)
            self._audit().record(
                AuditKind.BLOCKS_SWEPT, "files that nothing needs as much made room for others", files=len(swept)
            )
        return needs - self.room()[0]

    def _taken(self) -> int:
        taken = 0
        for path in self._store.blobs_folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                taken += path.stat().st_size
        return taken

    def _needed(self, wanted: Iterable[StoredBlocks]) -> set[Digest]:
        """Files that live plans have in use here or that are wanted."""
        plans = [(plan.model, plan.blocks_on(self._node)) for plan in self._plans()]
        return set(self._files_of([*plans, *((stored.model, stored.blocks) for stored in wanted)]))

    def _files_of(self, held: Iterable[tuple[Digest, Iterable[int]]]) -> Iterable[Digest]:
        for model, blocks in held:
            yield model
            manifest = self._files.known(model)
            if manifest is None:
                continue  # nothing of it is here yet
            inside = [block for block in blocks if block < len(manifest.blocks)]
            yield from (ref.digest for ref in (*block_files(manifest, inside), *tokenizer_file(manifest)))

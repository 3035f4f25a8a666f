"""Blocks that a plan may soon ask this node for, brought to its disk while nobody waits for them.

What to have comes from the leader (`schemas.staging`), what is worth most first. Files come a piece at a time, rest as
long as each took, and wait while a plan is being loaded. They never take the disk's reserve; where room is short, files
go first that nothing needs any more, or that are wanted less.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from nats.aio.client import Client
from nats.aio.msg import Msg

from agent.disk import Disk
from agent.fetching import Fetcher, block_files, tokenizer_file
from bus.audit import AuditTrail
from bus.identity import Identity
from models.store import Store
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import Digest
from schemas.capacity import StoredBlocks
from schemas.envelope import STAGING_TYPE, open_envelope
from schemas.errors import ResplitError
from schemas.staging import Staging

RETRY_S = 30.0
"""After a file could not be had: whoever has it may be back by then."""
BUSY_LOOK_S = 0.1
REST_MAX_S = 2.0

log = logging.getLogger(__name__)


class Gate:
    """Lets one piece through at a time, none while this node is busy, and rests as long as each piece took."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._one = asyncio.Lock()
        self._entered = 0.0

    async def __aenter__(self) -> None:
        await self._one.acquire()
        try:
            while self._is_busy():  # noqa: ASYNC110 (nobody waits for what is staged)
                await asyncio.sleep(BUSY_LOOK_S)
        except BaseException:
            self._one.release()
            raise
        self._entered = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await asyncio.sleep(min(REST_MAX_S, time.monotonic() - self._entered))
        finally:
            self._one.release()


class Stager:
    """Follows the leader's advice about this node's disk."""

    def __init__(
        self,
        identity: Identity,
        store: Store,
        files: Fetcher,
        disk: Disk,
        is_busy: Callable[[], bool],
        audit: AuditTrail,
        changed: Callable[[], None],
    ) -> None:
        """`is_busy`: whether a plan is being loaded; `changed` is called when other blocks are on the disk than
        before."""
        self._identity = identity
        self._store = store
        self._files = files
        self._disk = disk
        self._gate = Gate(is_busy)
        self._audit = audit
        self._changed = changed
        self._heard = (0, 0)
        """Term and number of the last advice."""
        self._wanted: tuple[StoredBlocks, ...] = ()
        self._news = asyncio.Event()
        self._cramped: set[Digest] = set()
        """Models of which there was no room for more when it was last tried: that is said once."""

    async def listen(self, client: Client) -> None:
        """Hear advice from now on, of the home of this node alone: others know less of what its disk is for."""
        subject = subjects.at_edge(self._identity.home, subjects.staging(self._identity.name))
        await client.subscribe(subject, cb=self._arrived)

    async def run(self) -> None:
        """Bring what is wanted, until cancelled."""
        self._store.sweep(time.time())
        while True:
            self._news.clear()
            whole = True
            for place in range(len(self._wanted)):
                whole = await self._tried(place) and whole
                if self._news.is_set():
                    break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if whole else RETRY_S):
                    await self._news.wait()

    async def _arrived(self, msg: Msg) -> None:
        try:
            trusted = self._identity.steering(self._identity.home)
            staging, _ = open_envelope(msg.data, Staging, STAGING_TYPE, trusted)
        except ResplitError as error:
            log.warning("dropped advice on what to stage: %s", error.message)
            return
        if staging.node != self._identity.name or (staging.term, staging.number) <= self._heard:
            return
        self._heard = (staging.term, staging.number)
        if staging.blocks != self._wanted:
            self._wanted = staging.blocks
            self._news.set()

    async def _tried(self, place: int) -> bool:
        """Whether all of what is wanted in that place is on the disk now."""
        try:
            return await self._stage(self._wanted[: place + 1])
        except (ResplitError, OSError) as error:  # a full disk, say: a plan that needs the block will say so itself
            log.info("what a plan may need could not be staged: %s", error)
        except Exception:  # advice must never end the agent
            log.exception("what a plan may need could not be staged")
        return False

    async def _stage(self, wanted: Sequence[StoredBlocks]) -> bool:
        """Bring the last of these; the others are worth more."""
        stored = wanted[-1]
        manifest, fetched = await self._files.manifest(stored.model)
        begun, brought, whole = time.monotonic(), 0, True
        for block in sorted(stored.blocks & set(range(len(manifest.blocks)))):
            refs = block_files(manifest, [block]) + (tokenizer_file(manifest) if block == 0 else ())
            missing = await self._files.missing(refs)
            if missing and not await self._disk.room_ahead(missing, wanted):
                whole = False
                break
            fetched += await self._files.bring(missing, self._gate)
            brought += bool(missing)
            # They are hashed now, so that the plan that needs them need not.
            await self._files.missing(missing)
            await self._files.offer([stored.model, *(ref.digest for ref in refs)])
            if self._news.is_set():
                break
        self._changed()
        was_cramped = stored.model in self._cramped
        if whole:
            self._cramped.discard(stored.model)
        else:
            self._cramped.add(stored.model)
        if brought or (not whole and not was_cramped):
            self._audit.record(
                AuditKind.BLOCKS_STAGED,
                "blocks that a plan may need are on the disk" if whole else "the disk has no room for more blocks",
                model=stored.model,
                blocks=brought,
                size_bytes=fetched,
                elapsed_ms=round(1e3 * (time.monotonic() - begun), 3),
            )
        return whole

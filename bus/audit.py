"""The audit trail of one process: signed events in a hash chain, published in order, kept while the bus is away.

An event gets its place in the chain when its turn to be sent comes, not when it is recorded: what an overflow drops
then has no number yet, and the next event says how many were lost. From then on it is the same bytes however often
they are sent. The chain goes on behind it only once the stream has acknowledged it, so an event that a timeout leaves
in doubt is sent again, under the same `Nats-Msg-Id`, until it is certain. Outside the server's window for duplicates
it may then stand in the stream twice; readers know it by its number and bytes.

What is acknowledged is remembered in a file within `REMEMBER_S`, and the first event of the next life names it. The
file never runs ahead of the stream: a life that names what was never stored would look as if somebody had removed it.

When the stream is full, or its disk, the log says so once; the latest `BACKLOG_MAX` events wait in memory, `full` is
true, and the process goes on with everything else. Whoever would rather stop than go on unrecorded asks `full` and
`backlog`.

Who hears that its key is out of the roster, revoked or replaced, says no more here: behind others' word of that roster
nobody would believe it (`resplit.standing`), and a trail with such events in it does not look like an honest one.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js import JetStreamContext
from nats.js.api import Header
from nats.js.errors import APIError

from bus.heads import Heads, read_head, write_head
from bus.identity import Identity
from bus.subject_log import NO_ROOM
from schemas import subjects
from schemas.audit import NOTHING_BEFORE, AuditEvent, AuditKind, Checkpoint, Head, Link, envelope_digest
from schemas.base import DeploymentName, Digest, Home, LifeId, RequestId
from schemas.envelope import AUDIT_TYPE, seal
from schemas.merkle import Tree

BACKLOG_MAX = 10_000
"""Events kept while the bus is away; beyond that the oldest are dropped, and the next one says how many."""
CHECKPOINT_EVENTS = 256
CHECKPOINT_S = 60.0
"""A checkpoint follows the first news after the last one by no more than so many events, or seconds."""
REMEMBER_S = 1.0
"""A forced write for every event would be hard on an SD card."""
RETRY_S = 1.0
TEXT_MAX = 500
"""Characters of a field that are kept: some of them a stranger wrote."""

log = logging.getLogger(__name__)


class Trail(Protocol):
    """Where what happens is written down, whoever keeps it."""

    def record(
        self,
        kind: AuditKind,
        message: str,
        *,
        deployment: DeploymentName | None = None,
        epoch: int | None = None,
        request: RequestId | None = None,
        then: Callable[[], None] | None = None,
        **fields: str | int | float | bool | None,
    ) -> None: ...


@dataclass(frozen=True)
class _Waiting:
    """An event whose turn has not come."""

    event: AuditEvent
    then: Callable[[], None] | None = None


@dataclass(frozen=True)
class _Sealed:
    """An event in its place, under way until it is acknowledged."""

    event: AuditEvent
    link: Link
    data: bytes
    then: Callable[[], None] | None

    @property
    def digest(self) -> Digest:
        return envelope_digest(self.data)


class AuditTrail:
    """Signs and publishes audit events in the background; `record` never waits and never fails.

    `boot` tells this process from others of its name, and is random where it is not given. `memory` is the file that
    remembers the end of the chain for the next life, one for each process that runs at a time; without it the next
    life does not know. Subscribe `heads.note` to make its checkpoints witnesses of other writers' chains.
    """

    def __init__(
        self,
        js: JetStreamContext,
        identity: Identity,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        boot: str | None = None,
        memory: Path | None = None,
        checkpoint_s: float = CHECKPOINT_S,
        home: Home = None,
    ) -> None:
        """`home`: whose trail it is, for those at the EDGE."""
        self._home = home
        self._js = js
        self._identity = identity
        self._now = now
        self._memory = memory
        self._checkpoint_s = checkpoint_s
        self.life = LifeId(f"{identity.name}-{boot or secrets.token_hex(8)}")
        self.heads = Heads(lambda: identity.writers, identity.name, self.life)
        self.full = False
        """The server said at the last attempt that it has no room. (Of a full disk it may say nothing at all: then
        `backlog` grows.)"""
        self._before = None if memory is None else read_head(memory, identity.name)
        self.counts: Counter[AuditKind] = Counter()
        """Events of each kind that were recorded."""
        self._waiting: deque[_Waiting] = deque()
        self._sealed: _Sealed | None = None
        self._lost = 0
        self._tree, self._last = Tree(), NOTHING_BEFORE
        self._unsaid = 0
        self._news_since: float | None = None
        self._remembered, self._remembered_at = 0, 0.0
        self._ending = self._ended = False
        self._wake = asyncio.Event()
        self._all_out = asyncio.Event()

    def record(
        self,
        kind: AuditKind,
        message: str,
        *,
        deployment: DeploymentName | None = None,
        epoch: int | None = None,
        request: RequestId | None = None,
        then: Callable[[], None] | None = None,
        **fields: str | int | float | bool | None,
    ) -> None:
        """Append one event; what varies goes into `fields`, never tensors, prompts or keys.

        `then` is called once: when the stream has it, or at once where it will not for a while: the stream is full, or
        the event was dropped.
        """
        event = AuditEvent(
            at=self._now(),
            source=self._identity.name,
            kind=kind,
            message=message,
            deployment=deployment,
            epoch=epoch,
            request=request,
            fields={name: v[:TEXT_MAX] if isinstance(v, str) else v for name, v in fields.items()},
        )
        about = {"kind": kind.value, "deployment": deployment, "epoch": epoch, "request": request}
        log.info("%s: %s %s", kind.value, message, fields, extra={k: v for k, v in about.items() if v is not None})
        self.counts[kind] += 1
        if self._identity.is_out:
            _call(then)
            return
        if len(self._waiting) >= BACKLOG_MAX:
            _call(self._waiting.popleft().then)
            self._lose(1)
        if self.full:
            _call(then)
            then = None
        self._waiting.append(_Waiting(event, then))
        self._all_out.clear()
        self._wake.set()

    @property
    def backlog(self) -> int:
        """Events that the stream has not acknowledged yet."""
        return len(self._waiting) + (self._sealed is not None)

    async def run(self) -> None:
        """Publish events in order until cancelled, or until this process's key is out of the roster; it may then be run
        again and goes on where it was."""
        while not self._identity.is_out:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._sleep_s()):
                    await self._wake.wait()
            self._wake.clear()
            while (sealed := self._next()) is not None:
                if not await self._publish(sealed):
                    await asyncio.sleep(RETRY_S)
                elif time.monotonic() - self._remembered_at >= REMEMBER_S:
                    await self._remember()
            if self._ending or time.monotonic() - self._remembered_at >= REMEMBER_S:
                await self._remember()
            if not self._waiting and self._sealed is None:
                self._all_out.set()
        log.warning("the key of %s is out of the roster: this process writes no audit events", self._identity.name)
        self._all_out.set()

    async def drain(self, timeout_s: float) -> None:
        """End the chain in order: wait until every event and a last checkpoint are out, at most `timeout_s`."""
        if self._identity.is_out:
            return
        begun = self._tree.count > 0 or self._sealed is not None or self._waiting
        if not begun or (self._ended and not self._waiting):
            return
        self._ending = True
        self._all_out.clear()
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_out.wait()

    # What is sent next.

    def _sleep_s(self) -> float:
        if self.heads.news and self._news_since is None:
            self._news_since = time.monotonic()
        wait_s = self._checkpoint_s
        if self._news_since is not None:
            wait_s = self._news_since + self._checkpoint_s - time.monotonic()
        if self._memory is not None and self._remembered < self._tree.count:
            wait_s = min(wait_s, self._remembered_at + REMEMBER_S - time.monotonic())
        return max(wait_s, 0.0)

    def _next(self) -> _Sealed | None:
        if self._identity.is_out:
            return None
        if self._sealed is None:
            if self._checkpoint_due():
                self._seal(_Waiting(self._checkpoint()))
            elif self._waiting:
                self._seal(self._waiting.popleft())
        return self._sealed

    def _checkpoint_due(self) -> bool:
        if self._ending and not self._waiting:
            return not self._ended
        late = self._news_since is not None and time.monotonic() - self._news_since >= self._checkpoint_s
        return self._unsaid >= CHECKPOINT_EVENTS or late

    def _checkpoint(self) -> AuditEvent:
        ends = self._ending and not self._waiting
        count = self._tree.count
        return AuditEvent(
            at=self._now(),
            source=self._identity.name,
            kind=AuditKind.CHECKPOINT,
            message="this life has recorded so many events",
            fields={"count": count, "ends": ends},
            checkpoint=Checkpoint(
                count=count,
                root=self._tree.root,
                heads=self.heads.take(),
                roster=self._identity.roster.version,
                ends=ends,
            ),
        )

    def _seal(self, waiting: _Waiting) -> None:
        number = self._tree.count + 1
        link = Link(
            life=self.life,
            number=number,
            previous=self._last,
            lost=self._lost,
            before=self._before if number == 1 else None,
        )
        self._lost = 0
        chained = waiting.event.model_copy(update={"chain": link})
        data = seal(chained, AUDIT_TYPE, self._identity.name, self._identity.key)
        self._sealed = _Sealed(chained, link, data, waiting.then)

    # How it is sent.

    async def _publish(self, sealed: _Sealed) -> bool:
        """Send it once; whether there is nothing more to do about it."""
        subject = subjects.at_edge(self._home, subjects.audit(sealed.event.source, sealed.event.kind))
        try:
            await self._js.publish(subject, sealed.data, headers={Header.MSG_ID.value: sealed.digest})
        except MaxPayloadError:  # nats-py refuses before anything is sent, so its number is free again
            log.exception("an audit event is larger than the server carries, and is lost")
            self._sealed = None
            self._lose(sealed.link.lost + 1)
            self._checkpointed(sealed.event.checkpoint)  # or it would be tried for ever
        except (NatsError, TimeoutError, OSError) as error:
            self._say_if_full(error)
            if self.full:
                self._nobody_waits()
            return False
        else:
            self._acknowledged(sealed)
        _call(sealed.then)
        return True

    def _acknowledged(self, sealed: _Sealed) -> None:
        self.full = False
        self._sealed = None
        self._last = sealed.digest
        self._tree = self._tree.with_leaf(bytes.fromhex(sealed.digest))
        self._checkpointed(sealed.event.checkpoint)

    def _checkpointed(self, checkpoint: Checkpoint | None) -> None:
        """An event, or a checkpoint, is out of the way."""
        self._ended = checkpoint is not None and checkpoint.ends
        if checkpoint is not None:
            self._unsaid, self._news_since = 0, None
        else:
            self._unsaid += 1
            self._news_since = time.monotonic() if self._news_since is None else self._news_since

    def _say_if_full(self, error: Exception) -> None:
        if not isinstance(error, APIError) or error.err_code not in NO_ROOM:
            log.debug("an audit event is not acknowledged: %r", error)
            return
        if not self.full:
            log.error(
                "the audit stream is full (%s); export it with `resplit audit export` and make room. Until then the "
                "latest %d events are kept in memory",
                error.description,
                BACKLOG_MAX,
            )
        self.full = True

    def _nobody_waits(self) -> None:
        """Whoever waits for an event to be stored goes on without."""
        sealed, waiting = self._sealed, self._waiting
        self._waiting = deque(_Waiting(one.event) for one in waiting)
        self._sealed = None if sealed is None else replace(sealed, then=None)
        for then in (*(() if sealed is None else (sealed.then,)), *(one.then for one in waiting)):
            _call(then)

    def _lose(self, count: int) -> None:
        if self._lost == 0:
            log.error("audit events are lost; the next one that is sent says how many")
        self._lost += count

    async def _remember(self) -> None:
        """Write the end of the chain down, if it has moved; a disk that takes nothing is said, and tried again."""
        self._remembered_at = time.monotonic()
        count = self._tree.count
        if self._memory is None or count == self._remembered:
            return
        head = Head(writer=self._identity.name, life=self.life, number=count, digest=self._last)
        try:
            await asyncio.to_thread(write_head, self._memory, head)
        except OSError as error:
            log.warning("the end of the audit chain could not be written to %s: %s", self._memory, error)
            return
        self._remembered = count


def _call(then: Callable[[], None] | None) -> None:
    if then is None:
        return
    try:
        then()
    except Exception:  # what somebody makes of an event must not keep the others from the stream
        log.exception("what was to follow an audit event failed")

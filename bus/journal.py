"""The journal of one life of an ingress: a request is in it before it is accepted, a token before it is said.

What waits is stored together, one append in flight, in order. An append names the message before it, so a
successor that appends a fence ends this life's say for good (`bus.succession`); the ingress then hears it and is
silent about the requests it had accepted. On the event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from nats.aio.client import Client

from bus.ledger import Ledger
from bus.sealed_requests import Seal
from bus.streams import JOURNAL_AGE_S
from bus.subject_log import MovedError, NoRoomError, SubjectLog, UnsureError
from schemas import subjects
from schemas.base import DeploymentName, LifeId, home_of
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import (
    MAX_MESSAGE_BYTES,
    Accepted,
    AcceptedRequest,
    Ended,
    Fence,
    Handle,
    Likely,
    Run,
    Tokens,
    pack_record,
    unpack_records,
)

ACCEPT_S = 5.0
"""A client waits this long for the journal, no longer: then it is told that nobody took its request."""
ACK_S = 1.0
"""A server that is killed answers nothing; the same append is then sent again, which can do no harm."""
ACK_S_MAX = 8.0
STALLED_S = 5.0
RETRY_S = 0.1
DOUBT_S = 2.0
TICK_S = 1.0
APPEND_BYTES = 256 << 10
"""Stored at once, unless one record is larger."""
HEADERS_BYTES = 512
WAITING_BYTES_MAX = 8 << 20
"""What may wait for a server that is away: a minute of rounds of 32 sequences is 3 MB."""
SLACK_BYTES = 512 << 10
MESSAGE_COST_BYTES = 2048
"""What a message costs its reader (0.1 to 0.4 ms), in bytes. The live requests are stated anew once all that was
written costs this much more than they do: so there are never more than some hundreds of messages to read."""
MESSAGES_MAX = 20_000
STATE_AGAIN_S = JOURNAL_AGE_S / 4

log = logging.getLogger(__name__)


class SupersededError(ResplitError):
    """Another life answers for this one's requests: `by`, or nobody knows who."""

    def __init__(self, life: LifeId, by: LifeId | None) -> None:
        super().__init__(ErrorCode.NODE_LOST, f"{by or 'another ingress'} took over from ingress {life}; ask again")
        self.life = life
        self.by = by


class _LostError(Exception):
    """The server has lost the end of what it had acknowledged, as after a power failure."""


@dataclass(slots=True, eq=False)
class _Waiting:
    data: bytes
    accepts: Handle | None = None
    """The request whose acceptance needs these bytes."""
    future: asyncio.Future[None] | None = None
    then: Callable[[], None] | None = None


class Journal:
    """Writes one deployment's journal in one life of an ingress; `run` does the work."""

    def __init__(
        self,
        client: Client,
        deployment: DeploymentName,
        life: LifeId,
        on_superseded: Callable[[SupersededError], None],
        now: Callable[[], float],
    ) -> None:
        """A `life` is never used twice. `on_superseded` is called once; no token is reported as stored after it."""
        self._client = client
        self._life = life
        self._on_superseded = on_superseded
        self._now = now
        subject = subjects.journal(deployment, life)
        self._log = SubjectLog(client, subjects.STREAM_JOURNAL, subject, home_of(deployment))
        self._ledger = Ledger()
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._all_out = asyncio.Event()
        self._ticked = False
        self._superseded: SupersededError | None = None
        self._last = 0
        """Sequence of the last message that the stream has of ours; 0: it has none."""
        self._emptied = False
        """We had the server remove all our messages: to find none proves nothing."""
        self._lost = False
        self._missing_since: float | None = None
        """Since when the stream has shown less than it acknowledged."""
        self._cost = self._stated_cost = self._messages = 0
        """What it costs to read all since the last statement; that statement; how many messages all this is."""
        self._stated_at = now()
        self._waits_since: float | None = None

    async def accept(
        self,
        request: AcceptedRequest,
        tokens: tuple[int, ...] = (),
        likely: tuple[Likely, ...] = (),
        seal: Seal | None = None,
    ) -> Handle:
        """Returns once the request, and the tokens that a predecessor had, are stored; with `seal` its tokens are
        sealed, these and those to come.

        Raises `ResplitError`, and then nothing is owed: `OVERLOADED` where the stream is full, `UNREACHABLE` where
        JetStream does not answer, `PAYLOAD_TOO_LARGE`, `INVALID_REQUEST`, and `SupersededError`.
        """
        self._check_may_wait()
        _check_readable(request, self._client.max_payload - HEADERS_BYTES)
        handle = self._ledger.open(request, tokens, likely, self._now(), seal)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        records = [pack_record(record) for record in self._ledger.statement_of(handle, self._now())]
        for data in records[:-1]:
            self._put(_Waiting(data, accepts=handle))
        self._put(_Waiting(records[-1], accepts=handle, future=stored))
        try:
            async with asyncio.timeout(ACCEPT_S):
                await stored
        except TimeoutError as error:
            self.end((handle,), ErrorCode.UNREACHABLE.value)
            message = f"JetStream did not store the request within {ACCEPT_S:g} s; see to nats-server, then ask again"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from error
        except asyncio.CancelledError:
            self.end((handle,), ErrorCode.CANCELLED.value)
            raise
        return handle

    def tokens(self, runs: Sequence[Run], stored: Callable[[], None]) -> None:
        """Journal one round; `stored` is called once the stream has it, rounds in order, and never once superseded.

        Raises `ResplitError(UNREACHABLE)` where too much waits for JetStream already; nothing of the round is kept.
        """
        if self._superseded is None:
            self._check_may_wait()
            self._put(_Waiting(pack_record(self._ledger.add(runs)), then=stored))

    def end(self, handles: Iterable[Handle], how: str) -> None:
        """These requests are owed nothing more: their last reply is out. `how`: `output`, or an error code."""
        if self._superseded is None:
            handles = tuple(handles)
            self._ledger.close(handles)
            self._put(_Waiting(pack_record(Ended(handles, how))))

    def confirm(self, stored: Callable[[], None]) -> None:
        """Call `stored` once everything before it is stored and this life was not superseded; else never.

        An error that is no token's companion is said only then: a life that was stopped and resumed finds every
        deadline passed, and its requests may be another's by now.
        """
        if self._superseded is None:
            self._put(_Waiting(pack_record(Tokens(())), then=stored))

    async def confirmed(self) -> None:
        """`confirm`, for who waits: returns where that would be called, and raises `SupersededError` where it never is;
        `ResplitError(OVERLOADED)` where the stream is full."""
        self._check_goes_on()
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(_Waiting(pack_record(Tokens(())), future=stored))
        await stored

    async def drain(self, timeout_s: float) -> None:
        """Wait until all is stored, and what nobody needs removed, at most `timeout_s`."""
        self._all_out.clear()
        self._ticked = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_out.wait()

    async def run(self) -> None:
        """Store what waits, until cancelled or superseded."""
        ticking = asyncio.create_task(self._tick_forever())
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    await self._store()
                if self._ticked:
                    self._ticked = False
                    await self._tidy()
                if not self._waiting:
                    self._all_out.set()
        except SupersededError as error:
            self._give_up(error)
        finally:
            ticking.cancel()
            await self._log.close()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._ticked = True
            self._wake.set()

    # What waits.

    def _check_goes_on(self) -> None:
        if self._superseded is not None:
            raise SupersededError(self._superseded.life, self._superseded.by)

    def _check_may_wait(self) -> None:
        self._check_goes_on()
        if self._waiting_bytes > WAITING_BYTES_MAX:
            message = f"{self._waiting_bytes} bytes wait for JetStream; see to nats-server and its disk, then ask again"
            raise ResplitError(ErrorCode.UNREACHABLE, message)

    def _put(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._waiting_bytes += len(waiting.data)
        self._all_out.clear()
        self._wake.set()

    async def _store(self) -> None:
        """Append the first of what waits as one message, and report them."""
        batch: list[_Waiting] = []
        size = 0
        for waiting in self._waiting:
            size += len(waiting.data)
            if batch and size > APPEND_BYTES:
                break
            batch.append(waiting)
        try:
            await self._append(b"".join([waiting.data for waiting in batch]))
        except NoRoomError as error:
            await self._make_room(str(error))
            return
        for waiting in batch:
            self._waiting.popleft()
            self._waiting_bytes -= len(waiting.data)
            if waiting.future is not None and not waiting.future.done():
                waiting.future.set_result(None)
            if waiting.then is not None:
                try:
                    waiting.then()
                except Exception:  # one round's replies must not keep the others from theirs
                    log.exception("a round was stored, and could not be told")
        if self._statement_due():
            await self._state()

    async def _make_room(self, why: str) -> None:
        """Refuse the requests that wait to be accepted; what is owed already waits until it fits."""
        log.warning("the journal takes no more: %s", why)
        message = f"the journal of requests takes no more ({why}); try again later, or give JetStream more room"
        refused = {waiting.accepts for waiting in self._waiting if waiting.accepts is not None}
        for waiting in self._waiting:
            if waiting.future is not None and not waiting.future.done():
                waiting.future.set_exception(ResplitError(ErrorCode.OVERLOADED, message))
        self._keep([waiting for waiting in self._waiting if waiting.accepts is None])
        if refused:
            self.end(refused, ErrorCode.OVERLOADED.value)  # the beginning of a long acceptance may be stored
        if not self._ledger:
            self._keep([])
            await self._tidy()
        elif not refused:
            await asyncio.sleep(RETRY_S)

    def _keep(self, waiting: Iterable[_Waiting]) -> None:
        self._waiting = deque(waiting)
        self._waiting_bytes = sum(len(one.data) for one in self._waiting)

    def _give_up(self, error: SupersededError) -> None:
        self._superseded = error
        for waiting in self._waiting:
            if waiting.future is not None and not waiting.future.done():
                waiting.future.set_exception(SupersededError(error.life, error.by))
        self._keep([])
        self._all_out.set()
        self._on_superseded(error)

    # What is stored.

    async def _append(self, data: bytes) -> None:
        """Store one message behind all others; raises `SupersededError` and `NoRoomError`."""
        while True:
            try:
                if self._lost:
                    for statement in self._statement():
                        await self._write(statement)
                    self._lost = False
                await self._write(data)
            except _LostError:
                log.exception("the stream lost messages that it had acknowledged; the live requests are stated anew")
            else:
                return

    @property
    def waits_s(self) -> float:
        """How long the oldest append has waited for JetStream to say that it is stored; 0 where none waits."""
        return 0.0 if self._waits_since is None else self._now() - self._waits_since

    async def _write(self, data: bytes) -> None:
        ack_s = ACK_S
        self._waits_since = self._now()
        said = False
        while True:
            try:
                self._last = await self._log.append(data, self._last, ack_s)
                break
            except MovedError:
                with contextlib.suppress(UnsureError):
                    if await self._was_stored(data):
                        break
            except UnsureError as error:
                log.debug("an append is not acknowledged: %s", error)
                ack_s = min(2 * ack_s, ACK_S_MAX)
            if self.waits_s > STALLED_S and not said:
                said = True
                log.warning("the journal has stored nothing for %g s: see to nats-server, and to its disk", STALLED_S)
            await asyncio.sleep(RETRY_S)
        self._waits_since = None
        self._emptied, self._missing_since = False, None
        self._messages += 1
        self._cost += len(data) + MESSAGE_COST_BYTES

    async def _was_stored(self, data: bytes) -> bool:
        """The last message is not the one we know: whether that is `data`, sent before and not acknowledged.

        Raises `SupersededError`, `_LostError` and `UnsureError`.
        """
        while (line := await self._log.next(self._last)) is not None:
            if line.data == data:
                self._last = line.sequence
                return True
            if (by := fenced_by(line.data)) is not None:
                raise SupersededError(self._life, by)
            log.error("message %d on our subject of the journal is not ours", line.sequence)
            self._last = line.sequence
        newest = await self._log.last()
        if (0 if newest is None else newest.sequence) < self._last and not self._emptied:
            self._doubt()
        if newest is None and self._last:
            if not self._emptied:
                # Not even a fence is left: whoever removed it may have answered for our requests long ago.
                raise SupersededError(self._life, None)
            self._last = 0
        elif newest is not None and newest.sequence < self._last:
            self._last, self._lost = newest.sequence, True
            raise _LostError
        return False

    def _doubt(self) -> None:
        """Raise `UnsureError` until what we stored has been missing for `DOUBT_S`: a server that leads the stream no
        more, or not for long, may not have heard of it."""
        now = time.monotonic()
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < DOUBT_S:
            raise UnsureError("what was acknowledged is not there")

    def _statement_due(self) -> bool:
        return self._cost > SLACK_BYTES + 2 * self._stated_cost or self._messages > MESSAGES_MAX

    def _statement(self) -> Iterator[bytes]:
        """All that is owed, as messages, made one by one: together the requests may be large."""
        message = bytearray()
        for record in self._ledger.statement(self._now()):
            data = pack_record(record)
            if message and len(message) + len(data) > APPEND_BYTES:
                yield bytes(message)
                message.clear()
            message += data
        yield bytes(message)

    async def _state(self) -> None:
        """State what is owed anew, and forget what was written before."""
        first, cost = 0, 0
        with contextlib.suppress(NoRoomError):
            for message in self._statement():
                await self._append(message)
                first = first or self._last
                cost += len(message) + MESSAGE_COST_BYTES
            await self._forget_before(first or self._last + 1)
        # Also where it failed: the next attempt comes when as much again was written.
        self._cost, self._stated_cost, self._messages, self._stated_at = 0, cost, 0, self._now()

    async def _tidy(self) -> None:
        """Leave nothing where nothing is owed; let nothing that is owed grow too old for the stream."""
        if not self._ledger and self._last:
            await self._forget_before(self._last + 1)
        elif self._ledger and self._now() - self._stated_at > STATE_AGAIN_S:
            await self._state()

    async def _forget_before(self, sequence: int) -> None:
        self._emptied = self._emptied or sequence > self._last
        try:
            # A fence that came meanwhile stays: its sequence is a later one.
            await self._log.forget_before(sequence)
        except UnsureError as error:
            log.warning("the beginning of the journal could not be removed: %s", error)
        else:
            if sequence > self._last:
                self._last = 0


def fenced_by(data: bytes) -> LifeId | None:
    """Whose fence a message holds, if it holds one; what cannot be read holds none."""
    try:
        records = unpack_records(data)
    except ResplitError:
        return None
    return next((record.by for record in records if isinstance(record, Fence)), None)


def _check_readable(request: AcceptedRequest, bytes_max: int) -> None:
    """What is written can be read again, by all the rules of reading."""
    try:
        data = pack_record(Accepted(0, request))
    except UnicodeEncodeError as error:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"the request cannot be journalled: {error}") from error
    if len(data) > min(bytes_max, MAX_MESSAGE_BYTES):
        message = f"the request needs {len(data)} bytes in the journal, the server carries {bytes_max}; send less"
        raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
    unpack_records(data)

"""The right to lead for a limited time: a key that its holder renews and that the server lets expire.

    Follower --the key was created--> Leader --a renewal was refused--> Deposed
       \\--refused, no answer--/         \\--renewed--/

Everything is decided by compare-and-set, never by a read (reads of a key-value bucket can be stale). The first
half is PURE: (state, answer, the process's own steady clock) -> state. No two processes compare clocks: the
server counts from when it stored a write, the leader from before it sent it, so the leader always stops first.

A lease can hold back an honest process; it cannot hold back a message that is already on its way. What a deposed
leader sent is refused by the log (`orchestrator/log.py`) and by agents, by its term.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from schemas.base import NodeId
from schemas.codec import decode, encode
from schemas.errors import ResplitError
from schemas.leader import LEASE_KEY, Claim

LEASE_S = 3.0
"""How long nobody leads after a leader was killed, and the longest pause of a leader (garbage collection, an
overloaded machine, a server that restarts) that costs it nothing. Agents serve meanwhile."""
RENEW_S = 1.0
"""Two renewals may get lost before the leader has to stop."""
MARGIN_S = 0.5
"""A leader stops acting so long before the server can let its lease expire. It covers clocks that run at different
speeds (a fifth, where real ones differ by a ten-thousandth) and the way of what was sent just before."""
CLAIM_S = 0.25
"""How often a follower tries. The server itself was seen to let a key expire up to 0.3 s late."""
RETRY_S = 0.2
ANSWER_S = 0.5
"""A compare-and-set takes a millisecond; what is not answered by then is tried again, well within the lease."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Follower:
    """Does not lead; tries for it at `claim_at`."""

    claim_at: float


@dataclass(frozen=True)
class Leader:
    """Holds the lease as far as it knows; it acts only before `safe_until`, and again after a later renewal."""

    revision: int
    """Of the key, as the last write of this process left it."""
    safe_until: float
    renew_at: float


@dataclass(frozen=True)
class Deposed:
    """The lease ran out or was taken; this time in office is over."""

    reason: str


State = Follower | Leader | Deposed


@dataclass(frozen=True)
class Stored:
    """The write of this process was the next one."""

    revision: int


@dataclass(frozen=True)
class Refused:
    """Another revision stands there. `ours`: a look showed one that this process wrote itself and never heard of."""

    ours: int | None = None


@dataclass(frozen=True)
class Silent:
    """No answer: the write may be stored or not."""


Answer = Stored | Refused | Silent


def answered(state: Follower | Leader, answer: Answer, sent_at: float, now: float) -> State:
    """The state after the answer to a claim (of a follower) or to a renewal (of a leader) sent at `sent_at`."""
    match state, answer:
        case _, Stored(revision):
            # Counted from before it was sent: the server stored it later than that.
            return Leader(revision, sent_at + LEASE_S - MARGIN_S, sent_at + RENEW_S)
        case Follower(), Refused(None) | Silent():
            return Follower(now + CLAIM_S)
        case Leader(), Silent():
            return replace(state, renew_at=now + RETRY_S)
        case Follower(), Refused(int(ours)):
            # When that was stored nobody knows, so nothing is safe before it was renewed.
            return Leader(ours, sent_at, now)
        case Leader(revision=known), Refused(int(ours)) if ours > known:
            return replace(state, revision=ours, renew_at=now)
        case Leader(), Refused():
            return Deposed("the lease ran out or another orchestrator holds it")
    raise AssertionError(f"{state} cannot be answered with {answer}")


def due_at(state: Follower | Leader) -> float:
    """When the next write is to be sent."""
    match state:
        case Follower(claim_at):
            return claim_at
        case Leader(renew_at=renew_at):
            return renew_at
        case _:
            assert_never(state)


def leads(state: State, now: float) -> bool:
    """Whether this process may act as the leader now."""
    return isinstance(state, Leader) and now < state.safe_until


def boot_clock() -> float:
    """Seconds since the machine started, those it was suspended included: a laptop that wakes up leads nothing."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """The lease of one orchestrator `name`, held or not, in the bucket that all of them share."""

    def __init__(self, bucket: KeyValue, name: NodeId, clock: Callable[[], float] = boot_clock) -> None:
        self._bucket = bucket
        self._clock = clock
        self._claim = Claim(leader=name, claim=secrets.token_hex(8))
        self._state: State = Follower(clock())
        self._changed = asyncio.Event()

    async def acquire(self) -> None:
        """Stand for the lead until this process has it."""
        self._claim = Claim(leader=self._claim.leader, claim=secrets.token_hex(8))
        self._state = Follower(self._clock())
        while not leads(self._state, self._clock()):
            await self._write_when_due()
            if isinstance(self._state, Deposed):
                self._state = Follower(self._clock() + CLAIM_S)

    async def hold(self) -> str:
        """Renew until this process is deposed; returns why."""
        while not isinstance(self._state, Deposed):
            await self._write_when_due()
        return self._state.reason

    async def may_act(self) -> None:
        """Return while this process leads. Where that is in doubt wait: for a renewal, or to be cancelled."""
        while not leads(self._state, self._clock()):
            self._changed.clear()
            await self._changed.wait()

    def announce(self, term: int) -> None:
        """From the next renewal on, the lease says this term."""
        self._claim = self._claim.model_copy(update={"term": term})

    async def release(self) -> None:
        """Give up what is held, so that another need not wait for it to run out; tries once."""
        state, self._state = self._state, Deposed("the lease was given up")
        if isinstance(state, Leader):
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                async with asyncio.timeout(ANSWER_S):
                    await self._bucket.delete(LEASE_KEY, last=state.revision)

    async def _write_when_due(self) -> None:
        assert not isinstance(self._state, Deposed)
        await asyncio.sleep(max(0.0, due_at(self._state) - self._clock()))
        sent_at = self._clock()
        answer = await self._write(self._state)
        self._state = answered(self._state, answer, sent_at, self._clock())
        self._changed.set()

    async def _write(self, state: Follower | Leader) -> Answer:
        value = encode(self._claim)
        try:
            async with asyncio.timeout(ANSWER_S):
                if isinstance(state, Leader):
                    return Stored(await self._bucket.update(LEASE_KEY, value, last=state.revision))
                return Stored(await self._bucket.create(LEASE_KEY, value))
        except KeyWrongLastSequenceError:
            return Refused(await self._written_by_us())
        except (NatsError, TimeoutError, OSError) as error:
            log.debug("the lease was not answered: %r", error)
            return Silent()

    async def _written_by_us(self) -> int | None:
        """The revision of our own claim, where an acknowledgement got lost. A stale one is refused when renewed."""
        try:
            async with asyncio.timeout(ANSWER_S):
                entry = await self._bucket.get(LEASE_KEY)
            found = decode(Claim, entry.value or b"", "the lease")
        except (KeyNotFoundError, ResplitError, NatsError, TimeoutError, OSError):
            return None
        return entry.revision if found.claim == self._claim.claim else None

"""The log of plan events: what an orchestrator wrote before this one, and how this one writes.

JetStream is both the log and the way to the agents, so an event is in force exactly when it is logged. Every
write names the sequence number of the last message of the whole log, and a new leader's first write is its own
name and term. From then on whatever the leader before it still sends is refused, of whichever deployment, and
tells it that it does not lead any more: an event of a lower term never stands behind one of a higher term.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import Header, RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from bus.identity import Identity
from orchestrator.rollout import Rollout, recovered
from schemas import subjects
from schemas.audit import envelope_digest
from schemas.base import DeploymentName, Digest, NodeId
from schemas.envelope import LEADER_TYPE, PLAN_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.known import PlanSeen
from schemas.leader import Leadership
from schemas.plan import PlanEvent

PUBLISH_TIMEOUT_S = 2.0
RETRY_S = 0.5
WRONG_LAST_SEQUENCE = 10071
"""JetStream's error code for "another message stands last"."""
EVERY_SUBJECT = ">"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """What the log says of one deployment."""

    last: PlanEvent
    digest: Digest
    """Of the envelope of `last`."""
    epoch: int

    @property
    def seen(self) -> PlanSeen:
        return PlanSeen(term=self.last.term, revision=self.last.revision, digest=self.digest)


async def _always() -> None:
    """Nobody else is known who might lead."""


class PlanLog:
    """Reads the stream of plan events once, then appends to it.

    `may_act` returns while this process leads, and waits while that is in doubt; it is asked before every attempt.
    `with_keys` adds to an event what its nodes need to open sealed blocks.
    """

    def __init__(
        self,
        js: JetStreamContext,
        identity: Identity,
        may_act: Callable[[], Awaitable[None]] = _always,
        with_keys: Callable[[PlanEvent], PlanEvent] = lambda event: event,
    ) -> None:
        self._js = js
        self._identity = identity
        self._may_act = may_act
        self._with_keys = with_keys
        self._last = 0
        """The sequence number of the last message that was looked at."""
        self._reject: Callable[[str, ResplitError], None] = lambda subject, error: None
        self._newest: dict[DeploymentName, PlanSeen] = {}

    @property
    def newest(self) -> Mapping[DeploymentName, PlanSeen]:
        """The newest event of each deployment in the log, those that changed last at the end."""
        return self._newest

    async def take_office(
        self, leader: NodeId, now: datetime, reject: Callable[[str, ResplitError], None]
    ) -> tuple[Leadership, dict[DeploymentName, Rollout]]:
        """Recover, and write `leader` and its new term behind all that was recovered; nothing is in between."""
        while True:
            term, rollouts = await self.recover(now, reject)
            leadership = Leadership(leader=leader, term=term, since=now)
            data = seal(leadership, LEADER_TYPE, self._identity.name, self._identity.key)
            # Where the leader before it got in another word meanwhile, that word must be recovered too.
            if await self._until_answered(subjects.LEADER, data):
                return leadership, rollouts

    async def recover(
        self, now: datetime, reject: Callable[[str, ResplitError], None]
    ) -> tuple[int, dict[DeploymentName, Rollout]]:
        """(the term of whoever leads next, every deployment's rollout) as the log has them.

        The term is one more than any before. What no orchestrator signed is handed to `reject` and passed over, here
        and in `append`.
        """
        self._reject = reject
        self._last = 0
        kept: dict[DeploymentName, _Kept] = {}
        term = 0
        async for message in self._further():
            found = self._believed(message)
            if found is None:
                continue
            term = max(term, found.term)
            if isinstance(found, PlanEvent):
                before = kept.pop(found.deployment, None)
                kept[found.deployment] = _later(before, found, envelope_digest(message.data or b""))
        self._newest = {name: one.seen for name, one in kept.items()}
        term += 1
        return term, {name: recovered(one.last, one.epoch, term, now) for name, one in kept.items()}

    async def append(self, event: PlanEvent) -> None:
        """Log the event, trying until the log has it; a repeated attempt never logs it twice.

        Raises `ResplitError(STALE_EPOCH)` if another orchestrator has written to the log since.
        """
        subject = subjects.plan(event.deployment)
        keyed = await asyncio.to_thread(self._with_keys, event)
        data = seal(keyed, PLAN_TYPE, self._identity.name, self._identity.key)
        while not await self._until_answered(subject, data):
            if await self._look_behind(event, data):
                break
        self._newest.pop(event.deployment, None)
        seen = PlanSeen(term=event.term, revision=event.revision, digest=envelope_digest(data))
        self._newest[event.deployment] = seen

    async def _until_answered(self, subject: str, data: bytes) -> bool:
        """Whether the log took it; False where a message that was not looked at yet stands last."""
        while True:
            await self._may_act()
            headers = {
                Header.MSG_ID.value: sha256(data).hexdigest(),
                Header.EXPECTED_LAST_SEQUENCE.value: str(self._last),
            }
            try:
                ack = await self._js.publish(subject, data, timeout=PUBLISH_TIMEOUT_S, headers=headers)
            except APIError as error:
                if error.err_code == WRONG_LAST_SEQUENCE:
                    return False
                await self._pause(error)
            except (NatsError, TimeoutError, OSError) as error:
                await self._pause(error)
            else:
                self._last = max(self._last, ack.seq)
                return True

    async def _pause(self, error: Exception) -> None:
        log.warning("the log of plans did not answer; trying again: %r", error)
        await asyncio.sleep(RETRY_S)

    async def _look_behind(self, event: PlanEvent, data: bytes) -> bool:
        """Whether an earlier attempt of this event stands behind our last word.

        Anybody who may publish could otherwise end every leadership with one message: what no orchestrator
        signed is rejected, and what is older than this event is a replay, which agents ignore as well. Raises
        STALE_EPOCH for anything else: another orchestrator leads.
        """
        ours = False
        try:
            async for message in self._further():
                if message.data == data:
                    ours = True
                    continue
                found = self._believed(message)
                if found is not None and _outranks(found, event):
                    reason = f"term {found.term} stands in the log of plans; this orchestrator led in term {event.term}"
                    raise ResplitError(ErrorCode.STALE_EPOCH, reason)
        except (NatsError, TimeoutError, OSError) as error:
            await self._pause(error)
        return ours

    async def _further(self) -> AsyncIterator[RawStreamMsg]:
        """Every message behind the last one that was looked at. Each counts as looked at once the next is asked for."""
        end = (await self._js.stream_info(subjects.STREAM_PLANS)).state.last_seq
        while True:
            try:
                message = await self._js.get_msg(
                    subjects.STREAM_PLANS, seq=self._last + 1, subject=EVERY_SUBJECT, next=True
                )
            except NotFoundError:
                break
            yield message
            assert message.seq is not None
            self._last = message.seq
        self._last = max(self._last, end)  # the last messages of a log may have been deleted

    def _believed(self, message: RawStreamMsg) -> PlanEvent | Leadership | None:
        """What a message of the log says of plans if an orchestrator signed it; what is not believed is said."""
        subject, data = message.subject or "", message.data or b""
        if subject == subjects.ROSTER:
            return None  # what the root says stands in the same stream; `bus.following` reads it
        trusted = self._identity.orchestrators
        try:
            if subject == subjects.LEADER:
                return open_envelope(data, Leadership, LEADER_TYPE, trusted)[0]
            event, _ = open_envelope(data, PlanEvent, PLAN_TYPE, trusted)
            if subject != subjects.plan(event.deployment):
                raise ResplitError(ErrorCode.BAD_SIGNATURE, "the event is about another deployment")
        except ResplitError as error:
            self._reject(subject, error)
            return None
        return event


def _outranks(found: PlanEvent | Leadership, event: PlanEvent) -> bool:
    """Whether somebody else leads who wrote `found`, given that this process is about to write `event`."""
    if isinstance(found, Leadership) or found.deployment != event.deployment:
        return found.term > event.term
    return (found.term, found.revision) >= (event.term, event.revision)


def _later(kept: _Kept | None, event: PlanEvent, digest: Digest) -> _Kept:
    epoch = max([plan.epoch for plan in event.plans], default=0)
    if kept is not None and (event.term, event.revision) <= (kept.last.term, kept.last.revision):
        return replace(kept, epoch=max(epoch, kept.epoch))
    return _Kept(event, digest, epoch if kept is None else max(epoch, kept.epoch))

"""The log of plan events: what an orchestrator wrote before this one, and how this one writes.

JetStream is both the log and the way to the agents, so an event is in force exactly when it is logged. Every
write names the sequence number of the one before it on its subject: of two orchestrators that both believe
they lead, one write succeeds and the other learns that it does not lead any more.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import Header, RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from bus.keys import Identity
from orchestrator.rollout import Rollout, recovered
from schemas import subjects
from schemas.base import DeploymentName
from schemas.envelope import PLAN_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import PlanEvent

PUBLISH_TIMEOUT_S = 2.0
RETRY_S = 0.5
WRONG_LAST_SEQUENCE = 10071
"""JetStream's error code for "another message stands last on this subject"."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """What the log says of one deployment."""

    last: PlanEvent
    epoch: int


class PlanLog:
    """Reads the stream of plan events once, then appends to it."""

    def __init__(self, js: JetStreamContext, identity: Identity) -> None:
        self._js = js
        self._identity = identity
        self._last: dict[str, int] = {}
        self._reject: Callable[[str, ResplitError], None] = lambda subject, error: None

    async def recover(
        self, now: datetime, reject: Callable[[str, ResplitError], None]
    ) -> tuple[int, dict[DeploymentName, Rollout]]:
        """(this orchestrator's term, every deployment's rollout) as the log has them.

        The term is one more than any before. Events that are not signed by an orchestrator are handed to `reject`
        and passed over, here and in `append`.
        """
        self._reject = reject
        kept: dict[DeploymentName, _Kept] = {}
        term = 0
        sequence = 1
        while True:
            try:
                message = await self._js.get_msg(
                    subjects.STREAM_PLANS, seq=sequence, subject=subjects.ALL_PLANS, next=True
                )
            except NotFoundError:
                break
            assert message.seq is not None
            assert message.subject is not None
            sequence = message.seq + 1
            self._last[message.subject] = message.seq
            event = self._believed(message)
            if event is None:
                continue
            term = max(term, event.term)
            kept[event.deployment] = _later(kept.get(event.deployment), event)
        term += 1
        return term, {name: recovered(one.last, one.epoch, term, now) for name, one in kept.items()}

    async def append(self, event: PlanEvent) -> None:
        """Log the event, trying until the log has it; a repeated attempt never logs it twice.

        Raises `ResplitError(STALE_EPOCH)` if another orchestrator has written to this deployment's log since.
        """
        subject = subjects.plan(event.deployment)
        data = seal(event, PLAN_TYPE, self._identity.name, self._identity.key)
        while True:
            try:
                if await self._attempt(event, subject, data):
                    return
            except (NatsError, TimeoutError, OSError) as error:
                log.warning("the log of plans did not take an event; trying again: %r", error)
                await asyncio.sleep(RETRY_S)

    async def _attempt(self, event: PlanEvent, subject: str, data: bytes) -> bool:
        """Whether the log has the event now; False where others' messages had to be looked at first."""
        headers = {
            Header.MSG_ID.value: sha256(data).hexdigest(),
            Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(self._last.get(subject, 0)),
        }
        try:
            ack = await self._js.publish(subject, data, timeout=PUBLISH_TIMEOUT_S, headers=headers)
        except APIError as error:
            if error.err_code != WRONG_LAST_SEQUENCE:
                raise
            return await self._look_behind(event, subject, data)
        self._last[subject] = ack.seq
        return True

    async def _look_behind(self, event: PlanEvent, subject: str, data: bytes) -> bool:
        """What stands behind our last word: an earlier attempt of this event (True), or what changes nothing (False).

        Anybody who may publish could otherwise end every orchestrator with one message: what no orchestrator
        signed is rejected, and an event older than this one is a replay, which agents ignore as well. Raises
        STALE_EPOCH for anything else: another orchestrator leads.
        """
        while True:
            try:
                after = self._last.get(subject, 0) + 1
                message = await self._js.get_msg(subjects.STREAM_PLANS, seq=after, subject=subject, next=True)
            except NotFoundError:
                return False
            assert message.seq is not None
            if message.data != data:
                found = self._believed(message)
                if found is not None and (found.term, found.revision) >= (event.term, event.revision):
                    reason = "another orchestrator has written to the log of plans; this one does not lead any more"
                    raise ResplitError(ErrorCode.STALE_EPOCH, reason)
            self._last[subject] = message.seq
            if message.data == data:
                return True

    def _believed(self, message: RawStreamMsg) -> PlanEvent | None:
        """The event in a message of the log if an orchestrator signed it; what is not believed is said."""
        subject = message.subject or ""
        try:
            event, _ = open_envelope(message.data or b"", PlanEvent, PLAN_TYPE, self._identity.orchestrators)
            if subject != subjects.plan(event.deployment):
                raise ResplitError(ErrorCode.BAD_SIGNATURE, "the event is about another deployment")
        except ResplitError as error:
            self._reject(subject, error)
            return None
        return event


def _later(kept: _Kept | None, event: PlanEvent) -> _Kept:
    epoch = max([plan.epoch for plan in event.plans], default=0)
    if kept is None:
        return _Kept(event, epoch)
    newer = (event.term, event.revision) > (kept.last.term, kept.last.revision)
    return replace(kept, last=event if newer else kept.last, epoch=max(epoch, kept.epoch))

"""The log of plan events: what an orchestrator wrote before this one, and how this one writes.

JetStream is both the log and the way to the agents, so an event is in force exactly when it is logged. Every
write names the sequence number of the last message of the whole log, and a new leader's first write is its own
name and term. From then on whatever the leader before it still sends is refused, of whichever deployment, and
tells it that it does not lead any more: an event of a lower term never stands behind one of a higher term.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from hashlib import sha256

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import Header, RawStreamMsg
from nats.js.errors import APIError, NotFoundError

from bus.identity import Identity
from bus.sealed_plans import open_event, seal_event
from bus.subject_log import WRONG_LAST
from orchestrator.rollout import Rollout, recovered
from schemas import subjects
from schemas.audit import envelope_digest
from schemas.base import DeploymentName, NodeId
from schemas.envelope import LEADER_TYPE, PLAN_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.known import PlanSeen
from schemas.leader import Leadership
from schemas.plan import PlanEvent
from schemas.section import SealedEvent

PUBLISH_TIMEOUT_S = 2.0
RETRY_S = 0.5
EVERY_SUBJECT = ">"

log = logging.getLogger(__name__)


Said = SealedEvent | Leadership


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
        and in `append`. Raises `ResplitError` where the newest event of a deployment is not for this orchestrator:
        whoever led without knowing it would stop what serves, and use its epochs again.
        """
        self._reject = reject
        self._last = 0
        self._newest = {}
        newest: dict[DeploymentName, tuple[SealedEvent, NodeId]] = {}
        term = 0
        async for message in self._further():
            believed = self._believed(message)
            if believed is None:
                continue
            found, signer = believed
            term = max(term, found.term)
            if isinstance(found, SealedEvent):
                known = newest.get(found.deployment)
                if known is None or _age(found) > _age(known[0]):
                    newest[found.deployment] = found, signer
                    self._note(found, message.data or b"")
        term += 1
        events = {name: open_event(found, signer, self._identity) for name, (found, signer) in newest.items()}
        return term, {name: recovered(event, term, now) for name, event in events.items()}

    async def append(self, event: PlanEvent) -> None:
        """Log the event, trying until the log has it; a repeated attempt never logs it twice.

        Raises `ResplitError(STALE_EPOCH)` if another orchestrator has written to the log since.
        """
        subject = subjects.plan(event.deployment)
        data = await asyncio.to_thread(lambda: seal_event(self._with_keys(event), self._identity))
        while not await self._until_answered(subject, data):
            if await self._look_behind(event, data):
                break
        self._note(event, data)

    def _note(self, event: SealedEvent | PlanEvent, data: bytes) -> None:
        """The newest of its deployment, which is named last from now on."""
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
                if error.err_code in WRONG_LAST:
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
                believed = self._believed(message)
                if believed is not None and _outranks(believed[0], event):
                    term = believed[0].term
                    reason = f"term {term} stands in the log of plans; this orchestrator led in term {event.term}"
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

    def _believed(self, message: RawStreamMsg) -> tuple[Said, NodeId] | None:
        """What a message of the log says of plans if an orchestrator signed it, and which; what is not believed is
        said."""
        subject, data = message.subject or "", message.data or b""
        if subject == subjects.ROSTER:
            return None  # what the root says stands in the same stream; `bus.following` reads it
        home = self._identity.home
        try:
            if subject == subjects.LEADER:
                return open_envelope(data, Leadership, LEADER_TYPE, self._identity.steering(home))
            event, signer = open_envelope(data, SealedEvent, PLAN_TYPE, self._identity.orchestrators)
            if subject != subjects.plan(event.deployment):
                raise ResplitError(ErrorCode.BAD_SIGNATURE, "the event is about another deployment")
            self._identity.check_steers(signer, event.deployment, home)
        except ResplitError as error:
            self._reject(subject, error)
            return None
        return event, signer


def _outranks(found: Said, event: PlanEvent) -> bool:
    """Whether somebody else leads who wrote `found`, given that this process is about to write `event`."""
    if isinstance(found, Leadership) or found.deployment != event.deployment:
        return found.term > event.term
    return _age(found) >= _age(event)


def _age(event: SealedEvent | PlanEvent) -> tuple[int, int]:
    return event.term, event.revision

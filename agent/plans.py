"""Plan events as they come, and again after every silence: verified and opened, or rejected and audited.

What JetStream refuses to log still reaches whoever listens to its subject. So the word of a new leader fences: a
live event of a lower term counts only if the log turns out to have it.

What counts is on this node's disk before it is acted upon, so that whoever owns the bus cannot show a node that has
just started an older event as the newest.
"""

import logging
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg

from bus.audit import AuditTrail
from bus.connection import jetstream_at
from bus.identity import Identity
from bus.refusals import Refusals
from bus.sealed_plans import open_section
from bus.streams import look_now_and_then, stored_messages
from schemas import subjects
from schemas.audit import envelope_digest
from schemas.base import DeploymentId, Home, NodeId
from schemas.envelope import LEADER_TYPE, PLAN_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.leader import Leadership
from schemas.section import EventSection, SealedEvent

CATCH_UP_EVERY_S = 30.0
"""A plan event that got lost on its way is found in the stream at the latest after this."""

Verified = tuple[SealedEvent, NodeId]
"""An event that an orchestrator signed, still sealed, and which one."""

log = logging.getLogger(__name__)


class PlanInbox:
    """Hears plan events of one home live, and reads the newest one of each deployment at the start, after every
    reconnection and now and then: an event is the whole state, so the newest one is enough. What it tells this node is
    delivered, also that it is nothing."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        audit: AuditTrail,
        deliver: Callable[[EventSection], None],
        home: Home = None,
    ) -> None:
        """`home`: whose deployments they are about."""
        self._client = client
        self._home = home
        self._identity = identity
        self._refusals = Refusals(audit, "an orchestrator's event was rejected and nothing was changed")
        self._deliver = deliver
        self._term = 0
        """The highest term of that home heard of, whatever it was about."""
        self._newest: dict[DeploymentId, tuple[int, int]] = {}
        """Of the events delivered by this process, by `_age`."""
        self._look_again = False

    async def run(self) -> None:
        """Deliver verified events until cancelled."""
        await self._client.subscribe(subjects.at_edge(self._home, subjects.LEADER), cb=self._led)
        await self._client.subscribe(subjects.at_edge(self._home, subjects.ALL_PLANS), cb=self._arrived)
        await look_now_and_then(self._client, self._catch_up, CATCH_UP_EVERY_S, lambda: self._look_again)

    def look(self) -> None:
        """Look in the log soon: it has something that is not here."""
        self._look_again = True

    async def _catch_up(self) -> None:
        """Deliver the newest event of each deployment that is verified and follows what was seen.

        Not simply the last message of each subject: whoever may publish there may put rubbish behind the
        orchestrator's last word, and who stole its key an event too far ahead to be taken.
        """
        self._look_again = False
        found: dict[DeploymentId, list[tuple[Verified, Msg]]] = {}
        js = jetstream_at(self._client, self._home)
        for message in await stored_messages(js, subjects.STREAM_PLANS, subjects.LEADER):
            await self._led(message)
        for message in await stored_messages(js, subjects.STREAM_PLANS, subjects.ALL_PLANS):
            verified = self._verified(message)
            if verified is not None:
                found.setdefault(verified[0].deployment, []).append((verified, message))
        for events in found.values():
            for verified, message in sorted(events, key=lambda one: _age(one[0][0]), reverse=True):
                if await self._settled(*verified, message):
                    break

    async def _arrived(self, msg: Msg) -> None:
        verified = self._verified(msg)
        if verified is None:
            return
        event, _ = verified
        if event.term < self._term:
            log.warning("a plan event of term %d came in term %d; looking in the log", event.term, self._term)
            self.look()
            return
        await self._settled(*verified, msg)

    async def _settled(self, event: SealedEvent, signer: NodeId, msg: Msg) -> bool:
        """Act upon an event, unless it is refused or old; whether no older one can be the newest."""
        if _age(event) < self._newest.get(event.deployment, (0, 0)):
            return True  # it was overtaken on its way
        try:
            section = open_section(event, signer, self._identity)
            await self._identity.take_plan(event.deployment, event.term, event.revision, envelope_digest(msg.data))
        except ResplitError as error:
            self._refusals.record(msg, error)
            return error.code is ErrorCode.ROLLED_BACK and error.field != "digest"
        self._term = max(self._term, event.term)
        self._newest[event.deployment] = max(_age(event), self._newest.get(event.deployment, (0, 0)))
        self._deliver(section)
        return True

    async def _led(self, msg: Msg) -> None:
        try:
            leadership, _ = open_envelope(msg.data, Leadership, LEADER_TYPE, self._identity.steering(self._home))
        except ResplitError as error:
            self._refusals.record(msg, error)
            return
        self._term = max(self._term, leadership.term)

    def _verified(self, msg: Msg) -> Verified | None:
        try:
            event, signer = open_envelope(msg.data, SealedEvent, PLAN_TYPE, self._identity.orchestrators)
            subject = subjects.plan(event.deployment)
            if msg.subject not in (subject, subjects.at_edge(self._home, subject)):  # as it is stored, or came live
                raise ResplitError(ErrorCode.BAD_SIGNATURE, f"a plan of {event.deployment} came as {msg.subject}")
            self._identity.check_steers(signer, event.deployment, self._home)
        except ResplitError as error:
            self._refusals.record(msg, error)
            return None
        return event, signer


def _age(event: SealedEvent) -> tuple[int, int]:
    return event.term, event.revision

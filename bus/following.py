"""Keeping a process's roster the newest one that is on the bus.

Whoever is revoked is so where the roster that says it has arrived. It is heard live, and looked for at the start, after
every reconnection and now and then. Anybody may have put rubbish behind it, so the newest that holds counts.

Clients, and those who watch, read no stream that plans are in: they ask, and agents and orchestrators answer. Whoever
answers with an old one is not believed by who knows a newer.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from weakref import WeakKeyDictionary

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext

from bus.audit import AuditTrail
from bus.connection import jetstream_at
from bus.folders import ROSTER
from bus.identity import Identity
from bus.membership import Membership
from bus.refusals import Refusals
from bus.streams import look_now_and_then, stored_messages
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import Home
from schemas.errors import ErrorCode, ResplitError
from schemas.known import held

INBOX = "_INBOX."
OFFER_AGAIN_S = 2.0
LOOK_EVERY_S = 30.0
"""A roster that got lost on its way is found in the stream at the latest after this."""

ANSWER_S = 1.0
"""To be asked is the matter of a moment; who hangs is not waited for, since all goes on without an answer."""

log = logging.getLogger(__name__)


class RosterInbox:
    """Gives an identity every newer roster."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        audit: AuditTrail,
        on_change: Callable[[], object] = lambda: None,
        home: Home = None,
    ) -> None:
        """`on_change` hears that other members, or another policy, are in force. `home`: whose rosters they are, for
        those at the EDGE."""
        self._client = client
        self._home = home
        self._identity = identity
        self._audit = audit
        self._on_change = on_change
        self._refusals = Refusals(audit, "a roster was rejected and nothing was changed")
        self._said_stale = False
        self._look_again = False

    async def run(self) -> None:
        """Follow until cancelled."""
        await self._client.subscribe(subjects.at_edge(self._home, subjects.ROSTER), cb=self.arrived)
        if self._home is None:  # one of a process answers
            await self._client.subscribe(subjects.ROSTER_NEWEST, subjects.ROSTER_QUEUE, cb=self._asked)
        await look_now_and_then(self._client, self._look, LOOK_EVERY_S, lambda: self._look_again)

    def look(self) -> None:
        """Look in the stream soon: there is a roster that is not here."""
        self._look_again = True

    async def _look(self) -> None:
        self._look_again = False
        js = jetstream_at(self._client, self._home)
        for message in reversed(await stored_messages(js, subjects.STREAM_PLANS, subjects.ROSTER)):
            if await self._took(message):
                break
        self._check_time()

    async def arrived(self, msg: Msg) -> None:
        """Take a roster, if it is a newer one."""
        await self._took(msg)

    async def _asked(self, msg: Msg) -> None:
        if msg.reply.startswith(INBOX):  # to answer elsewhere would be to say there what somebody else wants said
            data = await asyncio.to_thread((self._identity.folder / ROSTER).read_bytes)
            with contextlib.suppress(NatsError, OSError):  # the connection is away, and whoever asked does not wait
                await self._client.publish(msg.reply, data)

    async def _took(self, msg: Msg) -> bool:
        """Whether the roster holds, news or not."""
        try:
            news = await self._identity.take_roster(msg.data)
        except ResplitError as error:
            # An earlier one lies in the stream for good: that alone is refused without a word.
            if error.code is not ErrorCode.ROLLED_BACK or error.field != "version":
                self._refusals.record(msg, error)
            return False
        if news:
            roster = self._identity.roster
            self._said_stale = False
            self._audit.record(
                AuditKind.ROSTER_TAKEN,
                "a newer roster is in force",
                version=roster.version,
                digest=roster.digest,
                members=len(roster.members),
            )
            self._on_change()
        return True

    def _check_time(self) -> None:
        if self._identity.is_stale() and not self._said_stale:
            self._said_stale = True
            roster = self._identity.roster
            log.warning("the roster of version %d expired at %s", roster.version, roster.expires_at)
            self._audit.record(
                AuditKind.ROSTER_STALE,
                "the roster has expired: nobody renewed it, or a newer one is kept from here",
                version=roster.version,
                expired_at=roster.expires_at.isoformat(),
            )


class Follower:
    """Keeps a membership the newest that is on the bus, for who reads no stream that plans are in."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._asked: WeakKeyDictionary[Client, int] = WeakKeyDictionary()
        """By connection: after how many reconnections it was asked over it."""

    async def follow(self, connection: Client) -> None:
        """Know the newest roster now, and from now on as it comes over `connection`. Where that was said before it asks
        again only after a reconnection. It never fails: what is known goes on."""
        asked, reconnects = self._asked.get(connection), connection.stats["reconnects"]
        if asked == reconnects:
            return
        self._asked[connection] = reconnects
        if asked is None:
            try:
                await connection.subscribe(subjects.ROSTER, cb=self._arrived)
            except (NatsError, OSError) as error:
                log.info("rosters cannot be followed over this connection yet: %r", error)
                del self._asked[connection]
                return
        await self.renew(connection)

    async def renew(self, connection: Client) -> None:
        """Ask for the newest roster; where nobody answers, the one that is known goes on."""
        data = await ask_for_roster(connection)
        if data is not None:
            await self._take(data)

    async def _arrived(self, msg: Msg) -> None:
        await self._take(msg.data)

    async def _take(self, data: bytes) -> None:
        try:
            if await asyncio.to_thread(self._membership.take, data):
                log.info("the roster of version %d is in force", self._membership.roster.version)
        except ResplitError as error:
            # Of two that answer one may be behind the other.
            old = error.code is ErrorCode.ROLLED_BACK and error.field == "version"
            log.log(logging.DEBUG if old else logging.WARNING, "a roster was not taken: %s", error.message)


async def ask_for_roster(client: Client) -> bytes | None:
    """The newest roster as somebody has it who serves or steers, unverified; None where nobody answers in time."""
    try:
        return (await client.request(subjects.ROSTER_NEWEST, b"", timeout=ANSWER_S)).data
    except (NatsError, TimeoutError, OSError) as error:
        log.info("nobody says what the newest roster is: %r", error)
        return None


async def publish_roster(js: JetStreamContext, data: bytes) -> None:
    """Put a signed roster where every member finds it. Raises what nats-py raises."""
    await js.publish(subjects.ROSTER, data)


async def offer_roster(js: JetStreamContext, identity: Identity) -> None:
    """Publish the roster of `identity` where the bus has none as new, so that one carried to a single machine by hand
    reaches all. Tries until that is done: nothing else waits for it, and the first failure is said."""
    said = False
    while True:
        try:
            await _offer(js, identity)
        except (NatsError, TimeoutError, OSError) as error:
            if not said:
                version = identity.roster.version
                log.warning("the roster of version %d could not be offered to the bus yet: %r", version, error)
                said = True
        else:
            return
        await asyncio.sleep(OFFER_AGAIN_S)


async def _offer(js: JetStreamContext, identity: Identity) -> None:
    stored = await stored_messages(js, subjects.STREAM_PLANS, subjects.ROSTER)
    if not any(_is_as_new(message.data, identity) for message in stored):
        await publish_roster(js, await asyncio.to_thread((identity.folder / ROSTER).read_bytes))


def _is_as_new(data: bytes, identity: Identity) -> bool:
    try:
        held(identity.known, data)
    except ResplitError:
        return False
    return True

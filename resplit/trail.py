"""Reading the audit trail from its stream, in order; `resplit.standing` says how far each event may be believed."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import DeliverPolicy
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError

from bus.credentials import Credentials
from bus.following import Follower
from bus.identity import read_roster
from bus.membership import Membership
from resplit.standing import Reader, Seen, Trust, trust_of
from schemas import subjects
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import Role

QUIET_S = 10.0
"""Without --follow: a replay that brings nothing for this long has come to a halt."""
FOLLOW_S = 3600.0

READERS: tuple[Role, ...] = ("operator", "observer", "archivist")
"""Who may read the trail."""
ASKING: tuple[Role, ...] = ("operator", "observer")
"""Who of them may ask for the newest roster."""


async def read_trail(js: JetStreamContext, follow: bool) -> AsyncIterator[bytes]:
    """The envelopes of the audit stream, oldest first: those there are now or, to `follow`, without end.

    An envelope may come twice where its writer could not know that it was stored. Raises `ResplitError(UNREACHABLE)`
    where there is no stream, or where it stops before its end: a part never passes for the whole.
    """
    try:
        info = await js.stream_info(subjects.STREAM_AUDIT)
        last = info.state.last_seq
        if info.state.messages == 0 and not follow:
            return
        reader = await js.subscribe(subjects.ALL_AUDIT, ordered_consumer=True, deliver_policy=DeliverPolicy.ALL)
    except (NotFoundError, ServiceUnavailableError) as error:
        message = "this NATS server has no audit stream yet; start an orchestrator"
        raise ResplitError(ErrorCode.UNREACHABLE, message) from error
    while True:
        try:
            envelope = await reader.next_msg(FOLLOW_S if follow else QUIET_S)
        except NatsTimeoutError:
            if follow:
                continue
            message = "the audit stream stopped before its end; see to nats-server and read it again"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from None
        yield envelope.data
        if not follow and envelope.metadata.sequence.stream >= last:
            return


def read_trust(folder: Path) -> Trust:
    """Whose events are believed, by a member's folder or the cluster's; no private key is needed to verify."""
    return trust_of(read_roster(folder))


async def follow_reader(connection: Client, who: Credentials, folder: Path) -> Callable[[bytes], Seen]:
    """What reads the envelopes of the trail in order, by the newest roster that `folder` or the bus has shown: who
    was enrolled since is no forger. An archivist goes by the folder."""
    membership = Membership(folder)
    if who.role in ASKING:
        await Follower(membership).follow(connection)
    roster = membership.roster
    reader = Reader(trust_of(roster))

    def read(data: bytes) -> Seen:
        nonlocal roster
        if roster is not membership.roster:
            roster = membership.roster
            reader.trust = trust_of(roster)
        return reader.read(data)

    return read

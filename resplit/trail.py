"""Reading the audit trail from its stream, in order; `resplit.standing` says how far each event may be believed."""

from collections.abc import AsyncIterator
from pathlib import Path

from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import DeliverPolicy
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError

from bus.identity import read_roster
from resplit.standing import Trust, trust_of
from schemas import subjects
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import Role

QUIET_S = 10.0
"""Without --follow: a replay that brings nothing for this long has come to a halt."""
FOLLOW_S = 3600.0

READERS: tuple[Role, ...] = ("operator", "observer", "archivist")
"""Who may read the trail."""


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

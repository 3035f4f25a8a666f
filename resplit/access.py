"""The way in: which NATS server a command goes to, and as whom."""

from dataclasses import dataclass
from pathlib import Path

from bus.connection import MemberClient
from bus.credentials import Credentials
from bus.identity import load_credentials
from resplit.defaults import CONNECT_TIMEOUT_S
from resplit.exchange import open_connection
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import Role


@dataclass(frozen=True)
class Access:
    """A NATS server, and the folder of the member that logs in to it."""

    url: str
    keys: Path

    async def connect(self, name: str, *roles: Role) -> MemberClient:
        """A connection to the server, which has to be there now, for what only `roles` may do.

        Raises what `credentials` and `open_connection` raise.
        """
        credentials = self.credentials(*roles)
        connection = MemberClient(credentials)
        await open_connection(self.url, name, CONNECT_TIMEOUT_S, credentials.nats_options, connection)
        return connection

    def credentials(self, *roles: Role) -> Credentials:
        """Those in the folder; raises `ResplitError(FORBIDDEN)` where it is not of a member of one of `roles`, rather
        than let the server refuse what comes later without a word."""
        who = load_credentials(self.keys)
        if who.role not in roles:
            message = (
                f"{self.keys} is the folder of {who.name!r}, which is enrolled as {who.role}; this takes the folder of "
                f"a member enrolled as {' or '.join(roles)} (--keys)"
            )
            raise ResplitError(ErrorCode.FORBIDDEN, message, "keys")
        return who

"""Sealing requests to a cluster: `Client(url, keys="./keys", sealer=Sealer("./keys"))`.

Unlike the client itself this needs the rest of Resplit: rosters, and how they are signed.
"""

import re
from datetime import UTC, datetime
from pathlib import Path

from nats.aio.client import Client

from bus.following import Follower
from bus.letters import MAX_READERS
from bus.membership import Membership
from bus.sealed_requests import Seal, seal_request
from resplit.replies import RequestError
from schemas.base import REQUEST_ID_PATTERN, DeploymentName, RequestId
from schemas.codec import CONTENT_TYPE, REQUEST_ID, SEALED
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import readers_at


class Sealer:
    """Seals requests to the trusted agents of the newest roster that a folder, a member's or the cluster's, or the bus
    has shown.

    No private key is used. A roster is verified with the root in the folder, taken only if it is newer, and remembered
    in the folder of a member, where that may be written. What is put there by hand counts too.
    """

    def __init__(self, folder: Path | str) -> None:
        """Raises `RequestError` where the folder holds no roster that its root signed."""
        self._folder = Path(folder).expanduser()
        try:
            self._membership = Membership(self._folder)
        except ResplitError as error:
            raise _of_the_folder(error) from error
        self._follower = Follower(self._membership)

    async def follow(self, connection: Client) -> None:
        """Know the newest roster now, and from now on as it comes over `connection`."""
        await self._follower.follow(connection)

    async def renew(self, connection: Client) -> None:
        """Ask for the newest roster; where nobody answers, the one that is known goes on."""
        await self._follower.renew(connection)

    def seal(self, deployment: str, request_id: str, data: bytes, content_type: str) -> "Sealed":
        """A request as it is sent, and what opens its replies; raises `RequestError`."""
        if re.fullmatch(REQUEST_ID_PATTERN, request_id) is None:
            message = f"{request_id!r} is no id of a request; use 1 to 64 of A-Z a-z 0-9 _ -"
            raise RequestError(ErrorCode.INVALID_REQUEST.value, message, "request_id", request_id)
        try:
            self._membership.look()
        except ResplitError as error:
            raise _of_the_folder(error) from error
        roster = self._membership.roster
        readers = readers_at(roster, datetime.now(UTC))
        try:
            if not 1 <= len(readers) <= MAX_READERS:
                message = (
                    f"the roster in {self._folder} names {len(readers)} trusted agents, and a request is sealed to "
                    f"1 to {MAX_READERS}; enrol agents with `--tier trusted`, or fewer"
                )
                raise ResplitError(ErrorCode.INVALID_REQUEST, message, "readers")
            letter, seal = seal_request(data, content_type, DeploymentName(deployment), RequestId(request_id), readers)
        except ResplitError as error:
            raise RequestError(error.code.value, error.message, error.field, request_id) from error
        return Sealed(letter, {CONTENT_TYPE: SEALED, REQUEST_ID: request_id}, roster.version, seal)


class Sealed:
    """One sealed request, as `resplit.exchange.Sealed` asks for it."""

    def __init__(self, data: bytes, headers: dict[str, str], roster: int, seal: Seal) -> None:
        self.data = data
        self.headers = headers
        self.roster = roster
        self._seal = seal

    def open(self, data: bytes, content_type: str) -> bytes | None:
        """The reply in a message; None where none of the request's readers sealed it."""
        if content_type != SEALED:
            return None
        try:
            return self._seal.open_reply(data)
        except ResplitError:
            return None


def _of_the_folder(error: ResplitError) -> RequestError:
    return RequestError(
        error.code.value, error.message, "keys" if error.code is ErrorCode.INVALID_REQUEST else error.field
    )

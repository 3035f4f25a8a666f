"""Sealing requests to a cluster: `Client(url, keys="./keys", sealer=Sealer("./keys"))`.

Unlike the client itself this needs the rest of Resplit: rosters, and how they are signed.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from bus.identity import read_roster
from bus.joining import ROSTER
from bus.letters import MAX_READERS
from bus.sealed_requests import Seal, seal_request
from resplit.replies import RequestError
from schemas.base import REQUEST_ID_PATTERN, DeploymentName, NodeId, RequestId
from schemas.codec import CONTENT_TYPE, REQUEST_ID, SEALED
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import readers_at


class Sealer:
    """Seals requests to the trusted agents of the roster in a member's folder, or in the cluster's.

    No private key is used. The roster is verified with the root in the folder, and read again when its file changes,
    so that a program which runs for long keeps up with the cluster once it is given the newer roster.
    """

    def __init__(self, folder: Path | str) -> None:
        """Raises `RequestError` where the folder holds no roster that its root signed."""
        self._folder = Path(folder).expanduser()
        self._stamp: tuple[int, int] | None = None
        self._look()

    def seal(self, deployment: str, request_id: str, data: bytes, content_type: str) -> "Sealed":
        """A request as it is sent, and what opens its replies; raises `RequestError`."""
        if re.fullmatch(REQUEST_ID_PATTERN, request_id) is None:
            message = f"{request_id!r} is no id of a request; use 1 to 64 of A-Z a-z 0-9 _ -"
            raise RequestError(ErrorCode.INVALID_REQUEST.value, message, "request_id", request_id)
        self._look()
        readers = readers_at(self._roster, datetime.now(UTC))
        try:
            if not 1 <= len(readers) <= MAX_READERS:
                message = (
                    f"the roster in {self._folder} names {len(readers)} trusted agents, and a request is sealed to "
                    f"1 to {MAX_READERS}; enrol agents with `--tier trusted`, or fewer"
                )
                raise ResplitError(ErrorCode.INVALID_REQUEST, message, "readers")
            return _sealed(deployment, request_id, data, content_type, readers)
        except ResplitError as error:
            raise _request_error(error, request_id) from error

    def _look(self) -> None:
        try:
            found = (self._folder / ROSTER).stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                self._roster = read_roster(self._folder)
                self._stamp = stamp
        except OSError as error:
            message = f"cannot read {self._folder / ROSTER}: {error.strerror}; name a member's folder (`resplit join`)"
            raise RequestError(ErrorCode.INVALID_REQUEST.value, message, "keys") from error
        except ResplitError as error:
            raise _request_error(error, None) from error


class Sealed:
    """One sealed request, as `resplit.exchange.Sealed` asks for it."""

    def __init__(self, data: bytes, headers: dict[str, str], seal: Seal) -> None:
        self.data = data
        self.headers = headers
        self._seal = seal

    def open(self, data: bytes, content_type: str) -> bytes | None:
        """The reply in a message; None where none of the request's readers sealed it."""
        if content_type != SEALED:
            return None
        try:
            return self._seal.open_reply(data)
        except ResplitError:
            return None


def _sealed(
    deployment: str, request_id: str, data: bytes, content_type: str, readers: Mapping[NodeId, X25519PublicKey]
) -> Sealed:
    letter, seal = seal_request(data, content_type, DeploymentName(deployment), RequestId(request_id), readers)
    return Sealed(letter, {CONTENT_TYPE: SEALED, REQUEST_ID: request_id}, seal)


def _request_error(error: ResplitError, request_id: str | None) -> RequestError:
    return RequestError(error.code.value, error.message, error.field, request_id)

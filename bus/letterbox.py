"""Letters inside a value that is signed: each reader has its own, and whoever is told the same shares one.

All letters are under the one signature, so nobody puts a letter of one value into another or leaves one out.
"""

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from bus.identity import Identity
from bus.letters import MAX_READERS, About, is_for, open_letter, seal_letter
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import sealing_key
from schemas.sealed import Letter

log = logging.getLogger(__name__)


def letters_to(told: Mapping[bytes, Iterable[NodeId]], identity: Identity, about: About) -> tuple[Letter, ...]:
    """Letters with each of these payloads for its readers, but for those who are no members.

    Raises `ResplitError(PAYLOAD_TOO_LARGE)` for what no letter holds.
    """
    letters: list[bytes] = []
    for payload, names in told.items():
        keys = {name: key for name in names if (key := _key_of(identity, name)) is not None}
        letters += _letters(payload, keys, about)
    return tuple(base64.b64encode(letter).decode() for letter in letters)


def letter_to(letters: Sequence[Letter], identity: Identity, about: About) -> bytes | None:
    """What the one letter to `identity` says; None where there is none.

    Raises `ResplitError`: INVALID_REQUEST for what is no letter, or for two, and as `open_letter` does.
    """
    mine = [letter for letter in map(_bytes, letters) if is_for(letter, identity.name)]
    if len(mine) > 1:
        message = f"{len(mine)} letters of {about.sender!r} about {about.request!r} are for {identity.name!r}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "letters")
    return open_letter(mine[0], identity.name, identity.sealing, about) if mine else None


def _key_of(identity: Identity, name: NodeId) -> X25519PublicKey | None:
    if name == identity.name:
        return identity.sealing.public_key()
    member = identity.member(name)
    return None if member is None else sealing_key(member)


def _letters(payload: bytes, keys: Mapping[NodeId, X25519PublicKey], about: About) -> list[bytes]:
    """One letter for all, or for as many as one can have. Whose key is nobody's gets none."""
    names = sorted(keys)
    try:
        some = [names[i : i + MAX_READERS] for i in range(0, len(names), MAX_READERS)]
        return [seal_letter(payload, {name: keys[name] for name in group}, about) for group in some]
    except ResplitError as error:
        if error.code is ErrorCode.PAYLOAD_TOO_LARGE:
            raise
        if len(names) > 1:
            return [letter for name in names for letter in _letters(payload, {name: keys[name]}, about)]
        log.warning("no %s of %s comes for %s: %s", about.kind, about.deployment, names[0], error.message)
        return []


def _bytes(letter: Letter) -> bytes:
    try:
        return base64.b64decode(letter, validate=True)
    except ValueError as error:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a letter is not base64", "letters") from error

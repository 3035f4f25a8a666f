"""The ends of audit chains: what a process remembers of its own over a restart, and what it hears of others'."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nats.aio.msg import Msg

from schemas.audit import HEADS_MAX, AuditEvent, AuditKind, Head
from schemas.base import LifeId, NodeId
from schemas.codec import decode, encode
from schemas.envelope import AUDIT_TYPE, open_envelope
from schemas.errors import ResplitError

log = logging.getLogger(__name__)


class Heads:
    """How far the chains of other lives are known to be stored, for the checkpoints of this one.

    Subscribe `note` to `subjects.ALL_AUDIT` (core NATS). An event that is heard live may still be refused by the
    stream, so what counts is the event *before* it: its writer goes on only once that was acknowledged.
    """

    def __init__(self, trusted: Callable[[], Mapping[NodeId, Ed25519PublicKey]], writer: NodeId, life: LifeId) -> None:
        """`trusted`: whose events are believed now."""
        self._trusted = trusted
        self._writer = writer
        self._life = life
        self._known: dict[tuple[NodeId, LifeId], Head] = {}
        self._unsaid: set[tuple[NodeId, LifeId]] = set()
        self.news = False
        """Something was heard that is worth a checkpoint. Checkpoints of a process of the same name are not: two
        orchestrators would answer each other for ever."""

    async def note(self, message: Msg) -> None:
        """Take one message of the audit stream as it comes."""
        self.hear(message.data)

    def hear(self, data: bytes) -> None:
        """Take one envelope; what its source did not sign is passed over, for the reader of the trail will see it."""
        try:
            event, signer = open_envelope(data, AuditEvent, AUDIT_TYPE, self._trusted())
        except ResplitError as error:
            log.debug("an audit event was not believed: %s", error.message)
            return
        link = event.chain
        if link is None or signer != event.source or link.number == 1 or link.life == self._life:
            return
        head = Head(writer=signer, life=link.life, number=link.number - 1, digest=link.previous)
        whose = signer, link.life
        known = self._known.pop(whose, None)
        if known is not None and known.number >= head.number:
            head = known
        else:
            self._unsaid.add(whose)
            self.news = self.news or event.kind is not AuditKind.CHECKPOINT or signer != self._writer
        self._known[whose] = head
        if len(self._known) > HEADS_MAX:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._unsaid.discard(oldest)

    def take(self) -> tuple[Head, ...]:
        """The heads that changed since they were last taken."""
        found = tuple(head for whose, head in self._known.items() if whose in self._unsaid)
        self._unsaid.clear()
        self.news = False
        return found


def read_head(path: Path, writer: NodeId) -> Head | None:
    """The last envelope of the life before, as `write_head` left it; None if nothing usable is there."""
    try:
        head = decode(Head, path.read_bytes(), path.name)
    except FileNotFoundError:
        return None
    except (OSError, ResplitError) as error:
        log.warning("the end of the audit chain before this one is not known: %s: %s", path, error)
        return None
    if head.writer != writer:
        log.warning("%s tells of the chain of %s, not of %s; it is passed over", path, head.writer, writer)
        return None
    return head


def write_head(path: Path, head: Head) -> None:
    """Store `head` so that a crash leaves either it or the one before; readable by its owner alone. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(encode(head))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""What a process refused of what was signed for it: audited, each message once, and so many at most."""

from hashlib import sha256

from nats.aio.msg import Msg

from bus.audit import AuditTrail
from schemas.audit import AuditKind
from schemas.errors import ResplitError

DIFFERENT_MAX = 1000
"""Different messages that are refused aloud; more are refused in silence."""


class Refusals:
    """Says of each message that it was refused, and why; never what it said."""

    def __init__(self, audit: AuditTrail, sentence: str, different_max: int = DIFFERENT_MAX) -> None:
        """`sentence` is the constant message of the audit events."""
        self._audit = audit
        self._different_max = different_max
        self._sentence = sentence
        self._said: set[bytes] = set()

    def record(self, msg: Msg, error: ResplitError) -> None:
        """Say it, unless it was said of the same message, or this is a flood, which must not fill the trail."""
        digest = sha256(msg.data).digest()
        if digest in self._said or len(self._said) >= self._different_max:
            return
        self._said.add(digest)
        self._audit.record(
            AuditKind.EVENT_REJECTED, self._sentence, code=error.code.value, error=error.message, subject=msg.subject
        )

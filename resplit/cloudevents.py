"""PURE: the audit trail as JSON Lines of CloudEvents 1.0, and back to the exact envelopes.

`data` is the event for whoever reads it; `resplitenvelope` is the envelope as it was published, in base64, and the
only thing that a verifier goes by: JSON that was parsed and written again need not have the bytes that were signed.
A line whose `data` is not what its envelope says is refused, so nobody is shown what nobody signed.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from typing import Any

from resplit.standing import Reader, signature_of
from schemas.audit import envelope_digest
from schemas.envelope import MAX_ENVELOPE_BYTES
from schemas.errors import ErrorCode, ResplitError

LINE_CHARS_MAX = 4 * MAX_ENVELOPE_BYTES
"""The envelope in base64 and its payload as JSON, with room for the rest."""
ENVELOPE = "resplitenvelope"
UNREADABLE = "resplit.audit.unreadable"


def as_line(data: bytes) -> str:
    """One envelope of the audit stream as one line, without the newline; also what is none, for it was there."""
    envelope = base64.b64encode(data).decode()
    found: dict[str, Any] = {"specversion": "1.0", "id": envelope_digest(data)}
    try:
        seen = Reader(None).read(data)
    except ResplitError:
        found |= {"source": "/resplit/unknown", "type": UNREADABLE, ENVELOPE: envelope}
        return json.dumps(found)
    event = seen.event
    found |= {
        "source": f"/resplit/{event.source}",
        "type": f"resplit.audit.{event.kind.value}",
        "time": event.at.isoformat(),
        "datacontenttype": "application/json",
    }
    if event.chain is not None:
        found |= {
            "resplitlife": event.chain.life,
            "resplitnumber": str(event.chain.number),  # CloudEvents' integers have 32 bits
            "resplitprevious": event.chain.previous,
        }
    found |= {
        "resplitsigner": seen.signer,
        "resplitsignature": base64.b64encode(signature_of(data)).decode(),
        ENVELOPE: envelope,
        "data": event.model_dump(mode="json", exclude_none=True),
    }
    return json.dumps(found, ensure_ascii=False)


def envelopes(lines: Iterable[str]) -> Iterator[bytes]:
    """The envelopes of an export, in order. Raises `ResplitError(CORRUPT_FILE)` naming the line at fault."""
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            data = base64.b64decode(found[ENVELOPE], validate=True)
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
            message = f"line {number} of the export is not an event that `resplit audit export` wrote"
            raise ResplitError(ErrorCode.CORRUPT_FILE, message, "file") from error
        if found != json.loads(as_line(data)):
            message = f"line {number} of the export shows something else than what was signed"
            raise ResplitError(ErrorCode.CORRUPT_FILE, message, "file")
        yield data

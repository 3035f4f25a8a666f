"""Who leads: the lease in the key-value bucket `resplit_leader`, and the word of a new leader in the log of plans."""

from pydantic import AwareDatetime, Field

from schemas.base import NodeName, Value

LEASE_KEY = "leader"
"""The one key of the bucket. Who created it leads until it expires."""


class Claim(Value):
    """The value of the lease: who holds it, or tries to."""

    leader: NodeName
    claim: str = Field(min_length=1, max_length=64)
    """Random, one for each time that an orchestrator stands for the lead: tells its own writes from a namesake's."""
    term: int | None = Field(default=None, ge=1)
    """None until the holder has read the log and announced its term there."""


class Leadership(Value):
    """One orchestrator's time in office, signed and logged ahead of its first plan event."""

    leader: NodeName
    """The process, not the identity: every orchestrator of a cluster signs as `orchestrator`."""
    term: int = Field(ge=1)
    """Greater than every term before it in the log."""
    since: AwareDatetime

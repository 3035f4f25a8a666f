"""What an agent is to have on its disk before any plan asks for it."""

from pydantic import AwareDatetime, Field

from schemas.base import NodeName, Value
from schemas.capacity import StoredBlocks


class Staging(Value):
    """The orchestrator's advice to one agent. Each is the whole of it: what an earlier one named and this one does not
    is wanted no more.

    Nothing waits for it and no promise rests on it. A plan fetches what it needs whether or not that was staged.
    """

    node: NodeName
    term: int = Field(ge=1)
    number: int = Field(ge=1)
    """Grows with each one of a term: an agent ignores what is older than what it heard."""
    issued_at: AwareDatetime
    blocks: tuple[StoredBlocks, ...] = Field(default=(), max_length=256)

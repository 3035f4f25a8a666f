"""What a request is held to: how soon its first token, how fast the others, when the last, and who goes first."""

from pydantic import Field

from schemas.base import Value

TARGET_MS_MAX = 24 * 3600 * 1000
PRIORITY_MAX = 9


class Slo(Value):
    """A class of service. A target that is absent promises nothing."""

    ttft_ms: float | None = Field(default=None, gt=0, le=TARGET_MS_MAX)
    """An objective: from arrival to the first token. What misses it is counted, never refused."""
    tpot_ms: float | None = Field(default=None, gt=0, le=TARGET_MS_MAX)
    """An objective: mean time per token after the first."""
    deadline_ms: float | None = Field(default=None, gt=0, le=TARGET_MS_MAX)
    """A limit: from arrival to the last token. What cannot meet it is refused at once, what passes it is ended."""
    priority: int = Field(default=0, ge=-PRIORITY_MAX, le=PRIORITY_MAX)
    """Higher goes first (`agent.urgency` says how far)."""

    @property
    def promises(self) -> bool:
        """Whether there is any target that a request can miss."""
        return (self.ttft_ms, self.tpot_ms, self.deadline_ms) != (None, None, None)


BEST_EFFORT = Slo()
"""It promises nothing."""

"""What a fault is, as a value: what it does, what is promised under it, and within which bound."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.faults.measure import Run, Seen
from benchmarks.faults.scene import Scene

GAP_S = 0.08
GAPS = 3


class SkippedError(Exception):
    """This fault cannot be tried here; the reason is its text."""


@dataclass(frozen=True)
class Scenario:
    """One fault and its promise."""

    name: str
    fault: str
    promise: str
    bound: str
    """In words, as the table has it."""
    holds: Callable[[Run], float | None]
    """By how many seconds a run exceeds the bound (negative: it is within), or None where there is no bound."""
    measures: Literal["resume_s", "gap_s", "took_s"]
    act: Callable[[Scene], Awaitable[Seen]]
    orchestrators: int = 1
    servers: int = 1
    """NATS servers that are one."""
    parted: bool = False
    """Whether it takes wires between them."""
    runs_min: int = 1
    """Where each run tries another moment."""
    runs_max: int | None = None
    """Where a cluster can go through it only so often, or it takes long."""
    wired: bool = False
    """Whether it takes wires between the agents."""
    prepare: Callable[[Scene], Awaitable[None]] | None = None
    """Done once, before the first run."""

    def runs(self, wanted: int) -> int:
        """How often it is tried."""
        return max(self.runs_min, min(wanted, self.runs_max or wanted))


def within(bound_s: float, of: Literal["resume_s", "gap_s", "took_s"] = "resume_s") -> Callable[[Run], float | None]:
    return lambda run: getattr(run, of) - bound_s


def smooth(run: Run) -> float:
    return run.gap_s - max(GAPS * run.median_gap_s, GAP_S)


def unbounded(_: Run) -> None:
    return None

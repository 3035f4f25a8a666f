"""PURE: what a leader waits for between its steps, as values that whoever drives it performs."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from orchestrator.cold import Leaving
from orchestrator.planner import Proposal
from orchestrator.preloading import Preload
from orchestrator.services.standing import Standing
from schemas.plan import PlanEvent


@dataclass(frozen=True)
class Append:
    """Store this event; the step that it tells of holds once it is stored."""

    event: PlanEvent


Solved = Proposal | Standing | Leaving | Preload | None


@dataclass(frozen=True)
class Solve:
    """Call this, which takes anything up to seconds and concerns nobody else; send its answer, or throw its error."""

    make: Callable[[], Solved]


Effect = Append | Solve
Steps = Generator[Effect, Solved, None]

"""Contenders side by side in worlds that are not those of one split model: every one on every seed and at every load,
over all cores. What such worlds are, and who decides in them, is in `tiers` and in `residency`."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Generic, TypeVar

from pydantic import Field

from schemas.base import Value
from schemas.errors import ErrorCode, ResplitError
from simulator.many import run_all
from simulator.scenario import NAME_LENGTH_MAX
from simulator.shelf import Shelf

LOADS_MAX = 20


class ContestScenario(Value):
    """What every such scenario says."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH_MAX)
    title: str = Field(min_length=1, max_length=200)
    loads: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field(default=(1.0,), min_length=1, max_length=LOADS_MAX)
    """Each is run for itself: times as many requests."""


class ContestRun(Value):
    """One run: what it was."""

    contender: str
    seed: int
    load: float
    trace_hash: str


S = TypeVar("S", bound=ContestScenario)
R = TypeVar("R", bound=ContestRun)


@dataclass(frozen=True)
class ContestJob(Generic[S]):
    """One run that is to be done."""

    scenario: S
    contender: str
    seed: int
    load: float


class ContestResults(Value, Generic[S, R]):
    """What a comparison found."""

    scenario: S
    command: str
    at: str
    machine: str
    contenders: dict[str, str] = Field(min_length=1)
    runs: tuple[R, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(sorted({run.load for run in self.runs}))

    def of(self, contender: str, load: float) -> tuple[R, ...]:
        """In the order of seeds."""
        found = (run for run in self.runs if run.contender == contender and run.load == load)
        return tuple(sorted(found, key=lambda run: run.seed))


Verdict = tuple[str, str, str, str]
"""A figure, its target, what was found, and what that comes to."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """A figure of a run."""

    of: Callable[[R], float]
    more_is_better: bool | None = None
    """None where neither is, in itself."""


@dataclass(frozen=True)
class Contest(Generic[S, R]):
    """A kind of world, who decides in it, and what is looked at."""

    scenario: type[S]
    kind: type[R]
    where: str
    """In a sentence about policies that there are not there."""
    contenders: Mapping[str, str]
    """What each does, by name."""
    system: str
    run: Callable[[ContestJob[S]], R]
    """One run, in whichever process."""
    columns: Mapping[str, Column[R]]
    held: Callable[[ContestResults[S, R], float], Iterator[Verdict]]
    """What is aimed at, at a load."""
    rows: Callable[[S, R], Mapping[str, str]]
    """Of a run all that there is, as CSV has it."""
    pictures: Callable[[ContestResults[S, R]], Iterator[tuple[str, str, bytes]]]
    """File, title and PNG of each plot."""
    about: Callable[[S], str]
    """How long a run is, and how often is decided."""
    note: str
    """What the tables say."""

    def named(self, name: str) -> str:
        """Raises `ResplitError(INVALID_REQUEST)` for one that there is not."""
        if name not in self.contenders:
            message = f"there is no policy {name!r} {self.where}; there are {', '.join(self.contenders)}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "policies")
        return name

    def jobs(self, scenario: S, contenders: Sequence[str], seeds: Sequence[int]) -> list[ContestJob[S]]:
        return [
            ContestJob(scenario, name, seed, load) for load in scenario.loads for seed in seeds for name in contenders
        ]

    def compare(
        self,
        scenario: S,
        contenders: Sequence[str],
        seeds: Sequence[int],
        command: str,
        processes: int,
        on_done: Callable[[], None],
        shelf: Shelf[R] | None = None,
    ) -> ContestResults[S, R]:
        """Run them all; `on_done` is called as each ends. What is on the `shelf` is not run again."""
        todo = self.jobs(scenario, contenders, seeds)
        runs = run_all(todo, self.run, processes, lambda job, run: on_done(), shelf, _made_of)
        return ContestResults[S, R](
            scenario=scenario,
            command=command,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=platform.processor() or platform.machine(),
            contenders={name: self.contenders[name] for name in contenders},
            runs=tuple(runs),
        )


def _made_of(job: ContestJob[S]) -> tuple[str, ...]:
    return job.scenario.model_dump_json(), job.contender, str(job.seed), str(job.load)

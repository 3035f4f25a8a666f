"""What a comparison found, as one value that is written to a file and read again: every run's metrics, and of a few
runs how they went."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from schemas.base import Value
from schemas.errors import ErrorCode, ResplitError
from simulator.metrics import Metrics, completed, measure
from simulator.records import Epoch, RunResult, Sample, Spell
from simulator.scenario import RequestClass, Scenario

BINS = 240
"""Points in time of a timeline: as many as a plot can show."""
PER_BIN = 20
"""Requests that a 95th percentile takes; with fewer, the points are fewer."""


class Run(Value):
    """One run of one policy on one seed, in short."""

    policy: str
    seed: int
    trace_hash: str
    swept: dict[str, float] = Field(default={})
    """The values tried, by the scenario's key, in a sweep."""
    metrics: Metrics
    violations: tuple[str, ...] = ()
    finished: str = "whole"
    events: int = 0
    wall_s: float = 0.0

    @property
    def point(self) -> tuple[tuple[str, float], ...]:
        """Where in a sweep it stands."""
        return tuple(sorted(self.swept.items()))

    @property
    def world(self) -> tuple[object, ...]:
        """Runs of one world may be compared pair by pair."""
        return self.trace_hash, self.seed, self.point


class Bin(Value):
    """The requests that arrived in a stretch of time, which begins at `at_s`."""

    at_s: float
    arrived: int
    failed: int
    """Rejected, failed or unfinished."""
    p50_ms: float | None
    """Of those that completed; None where none did."""
    p95_ms: float | None


class Timeline(Value):
    """How one run went, whatever its length in as many points."""

    policy: str
    seed: int
    begin_s: float
    end_s: float
    timeout_s: float
    bins: tuple[Bin, ...]
    epochs: tuple[Epoch, ...]
    spells: tuple[Spell, ...]
    samples: tuple[Sample, ...]


class Results(Value):
    """One scenario, the policies that were run on it side by side, and what came of it."""

    scenario: Scenario
    command: str
    """As it was given."""
    at: str
    """When, in UTC."""
    machine: str = ""
    """On which planner time was measured."""
    policies: dict[str, str] = Field(min_length=1)
    """In the order in which they are shown, with a sentence about each."""
    reference: str
    """The policy that the others are held against: the static optimum."""
    system: str
    """The policy that this is about: the full system."""
    bounds: tuple[str, ...] = ()
    """Those of the policies that know what no system knows: nobody is expected to beat them."""
    runs: tuple[Run, ...]
    shown: tuple[Timeline, ...] = ()
    """Of one seed, for the plots and the list of decisions."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    def of(self, policy: str) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.policy == policy)


def summary(result: RunResult, classes: Sequence[RequestClass], swept: dict[str, float] | None = None) -> Run:
    """A run in short. It holds no requests, so that a thousand runs fit into memory and into a file."""
    return Run(
        policy=result.policy,
        seed=result.seed,
        trace_hash=result.trace_hash,
        swept=swept or {},
        metrics=measure(result, classes),
        violations=tuple(result.violations),
        finished=result.finished,
        events=result.events,
        wall_s=result.wall_s,
    )


def timeline(result: RunResult) -> Timeline:
    """How a run went, over the time in which requests arrived."""
    count = min(BINS, max(1, len(result.outcomes) // PER_BIN))
    edges = np.linspace(result.begin_s, result.end_s, count + 1)
    arrived = np.asarray([outcome.arrival.at_s for outcome in result.outcomes])
    bins = np.clip(np.searchsorted(edges, arrived, "right") - 1, 0, count - 1)
    done = np.asarray([completed(outcome, result.timeout_s) for outcome in result.outcomes], dtype=bool)
    ms = np.asarray([(outcome.last_s or 0.0) - outcome.arrival.at_s for outcome in result.outcomes]) * 1e3
    points = []
    for number in range(count):
        here = bins == number
        well = ms[here & done]
        p50, p95 = np.percentile(well, (50, 95)) if well.size else (None, None)
        failed = int((here & ~done).sum())
        points.append(Bin(at_s=float(edges[number]), arrived=int(here.sum()), failed=failed, p50_ms=p50, p95_ms=p95))
    # A sample of each second of a long run is more than a plot shows, and than a file should hold.
    step = max(1, len(result.samples) // BINS)
    return Timeline(
        policy=result.policy,
        seed=result.seed,
        begin_s=result.begin_s,
        end_s=result.end_s,
        timeout_s=result.timeout_s,
        bins=tuple(points),
        epochs=tuple(result.epochs),
        spells=tuple(result.spells),
        samples=tuple(result.samples[::step]),
    )


def save(path: Path, results: Results) -> None:
    path.write_text(results.model_dump_json(indent=1) + "\n")


def load(path: Path) -> Results:
    """What `save` wrote. Raises `ResplitError` if it is missing or was not written by it."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        message = f"{path}: there is no such file; `resplit simulate SCENARIO` writes results.json into its folder"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, str(path)) from None
    except ValidationError as error:
        raise ResplitError.from_validation(error, f"{path} (is it a results.json of this version?)") from error

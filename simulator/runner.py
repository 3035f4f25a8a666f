"""Many runs at once: every policy on every seed and every point of a sweep, over all cores."""

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from orchestrator.planner import make_plan
from schemas.base import Value
from schemas.errors import ResplitError
from simulator.files import swept
from simulator.foresight import Foresight, foresee
from simulator.many import run_all
from simulator.oracle import oracle_of
from simulator.policies import CONTENDERS
from simulator.pricing import priced
from simulator.results import Results, Run, Timeline, summary, timeline
from simulator.scenario import Scenario
from simulator.shelf import Shelf
from simulator.traces import TraceRow, read_trace
from simulator.world import World

REFERENCE, SYSTEM = "static", "full"


class Done(Value):
    """What came of a run."""

    run: Run
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    scenario: Scenario
    policy: str
    seed: int
    swept: tuple[tuple[str, float], ...]
    shows: bool
    """Whether its timeline is wanted."""


def simulate(
    scenario: Scenario,
    policies: Sequence[str],
    seeds: Sequence[int],
    command: str,
    jobs: int,
    on_done: Callable[[Job, Run], None],
    shelf: Shelf[Done] | None = None,
) -> Results:
    """Run them all; `on_done` hears of each run as it ends. What is on the `shelf` is not run again. Raises what the
    scenario's trace raises."""
    wanted = list(_jobs(scenario, policies, seeds))
    done = run_all(wanted, run_one, jobs, lambda job, one: on_done(job, one.run), shelf, _made_of)
    return Results(
        scenario=scenario,
        command=command,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=platform.processor() or platform.machine(),
        policies={name: CONTENDERS[name].title for name in policies},
        reference=REFERENCE if REFERENCE in policies else policies[0],
        system=SYSTEM if SYSTEM in policies else policies[0],
        bounds=tuple(name for name in policies if CONTENDERS[name].is_bound),
        runs=tuple(one.run for one in done),
        shown=tuple(one.timeline for one in done if one.timeline is not None),
    )


def check_feasible(scenario: Scenario, seed: int) -> None:
    """Raise the planner's own `ResplitError` if the model can be placed at no point of the sweep even while nothing is
    wrong: such worlds would say nothing about any policy."""
    refused: ResplitError | None = None
    for _, varied in swept(scenario):
        oracle = oracle_of(varied, seed, _trace(varied))
        try:
            make_plan(oracle.deployment, oracle.physics.manifest, oracle.offered, 1, None, "told the truth")
        except ResplitError as error:
            refused = refused or error
        else:
            return
    assert refused is not None
    raise refused


def count(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]) -> int:
    """How many runs that makes."""
    return len(list(_jobs(scenario, policies, seeds)))


def run_one(job: Job) -> Done:
    """One run, in whichever process."""
    scenario = job.scenario
    known = _known(scenario.model_dump_json(), job.seed)
    result = World(scenario, CONTENDERS[job.policy], job.seed, _trace(scenario), foresight=known).run()
    priced(result, known)
    line = timeline(result) if job.shows else None
    return Done(run=summary(result, scenario.workload.classes, dict(job.swept)), timeline=line)


def _made_of(job: Job) -> tuple[str, ...]:
    trace = job.scenario.workload.trace
    bytes_of = "" if trace is None else hashlib.sha256(Path(trace).read_bytes()).hexdigest()
    return job.scenario.model_dump_json(), bytes_of, job.policy, str(job.seed), "with its timeline" if job.shows else ""


@lru_cache(maxsize=2)
def _known(scenario: str, seed: int) -> Foresight:
    """What there is to know of a world, by its JSON: the policies of one seed share it."""
    read = Scenario.model_validate_json(scenario)
    return foresee(oracle_of(read, seed, _trace(read)))


def _trace(scenario: Scenario) -> Sequence[TraceRow] | None:
    return None if scenario.workload.trace is None else read_trace(Path(scenario.workload.trace))


def _jobs(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    points = swept(scenario) if scenario.sweep else [({}, scenario)]
    for values, varied in points:
        for seed in seeds:
            for policy in policies:
                shows = seed == seeds[0] and varied is points[0][1]
                yield Job(varied, policy, seed, tuple(sorted(values.items())), shows)

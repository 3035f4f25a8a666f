"""Many runs at once: every policy on every seed and every point of a sweep, over all cores."""

import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from orchestrator.planner import make_plan
from schemas.errors import ResplitError
from simulator.files import swept
from simulator.foresight import Foresight, foresee
from simulator.oracle import oracle_of
from simulator.policies import CONTENDERS
from simulator.pricing import priced
from simulator.results import Results, Run, summary, timeline
from simulator.scenario import Scenario
from simulator.shelf import Done, Shelf
from simulator.traces import TraceRow, read_trace
from simulator.world import World

REFERENCE, SYSTEM = "static", "full"


@dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    number: int
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
    shelf: Shelf | None = None,
) -> Results:
    """Run them all; `on_done` hears of each run as it ends. What is on the `shelf` is not run again. Raises what the
    scenario's trace raises."""
    wanted = list(_jobs(scenario, policies, seeds))
    runs: dict[int, Done] = {}

    def ended(job: Job, done: Done, is_new: bool = True) -> None:
        runs[job.number] = done
        if shelf is not None and is_new:
            shelf.keep(job.scenario, job.policy, job.seed, done)
        on_done(job, done.run)

    todo = []
    for job in wanted:
        before = None if shelf is None else shelf.find(job.scenario, job.policy, job.seed, job.shows)
        if before is None:
            todo.append(job)
        else:
            ended(job, before, is_new=False)
    if jobs == 1:
        for job in todo:
            ended(job, run_one(job))
    else:
        # Not forked: threads of numerical libraries do not survive that.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run_one, job): job for job in todo}
            for future in as_completed(futures):
                ended(futures[future], future.result())
    done = [runs[job.number] for job in wanted]
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


@lru_cache(maxsize=2)
def _known(scenario: str, seed: int) -> Foresight:
    """What there is to know of a world, by its JSON: the policies of one seed share it."""
    read = Scenario.model_validate_json(scenario)
    return foresee(oracle_of(read, seed, _trace(read)))


def _trace(scenario: Scenario) -> Sequence[TraceRow] | None:
    return None if scenario.workload.trace is None else read_trace(Path(scenario.workload.trace))


def _jobs(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    points = swept(scenario) if scenario.sweep else [({}, scenario)]
    numbers = itertools.count()
    for values, varied in points:
        for seed in seeds:
            for policy in policies:
                shows = seed == seeds[0] and varied is points[0][1]
                yield Job(next(numbers), varied, policy, seed, tuple(sorted(values.items())), shows)

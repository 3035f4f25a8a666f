"""Contenders side by side in worlds of two tiers: every one on every seed and at every load, over all cores."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field

from schemas.base import Value
from schemas.errors import ErrorCode, ResplitError
from simulator.many import run_all
from simulator.shelf import Shelf
from simulator.tiers.contenders import CloudOnly, Corrected, RoundRobin, StaticAll, at_load
from simulator.tiers.drawn import Drawn, drawn, requests, trace_hash, with_cloud
from simulator.tiers.paper import Paper, PropAvg
from simulator.tiers.references import Clairvoyant, Genetic, SlotProgram
from simulator.tiers.scenario import TwoTierScenario
from simulator.tiers.world import Contender, TierWorld, Went

PAPER, SYSTEM, BOUND = "paper", "corrected", "clairvoyant"
KNOWN: dict[str, tuple[type, str]] = {
    PAPER: (Paper, "The paper's proposal: its core program, and effective capacity as if work came evenly."),
    SYSTEM: (
        Corrected,
        "Ours: cores that survive a node, drift plus penalty, delays of what comes one by one.",
    ),
    "prop-avg": (PropAvg, "The paper's, with mean delays."),
    "round-robin": (RoundRobin, "LBRR: as many as the load asks for on one node after another, requests in turn."),
    "genetic": (Genetic, "Breeds light instances every 100 slots, for cost and mean delay."),
    "slot-program": (SlotProgram, "An integer program in each slot, by mean rates, solved for as long as a second."),
    "static-all": (StaticAll, "Ours, decided once for what is expected."),
    "cloud-only": (CloudOnly, "Everything in a cloud that has plenty of all."),
    BOUND: (Clairvoyant, "Everything everywhere, and requests go where it is known that they will be done first."),
}


class TierRun(Went):
    """One run."""

    contender: str
    seed: int
    load: float
    trace_hash: str

    @property
    def on_time_percent(self) -> float:
        return 100.0 * sum(self.on_time.values()) / max(1, sum(self.arrived.values()))

    @property
    def worst_percent(self) -> float:
        """Of the task that fares worst."""
        shares = [self.on_time.get(task, 0) / count for task, count in self.arrived.items() if count]
        return 100.0 * min(shares, default=0.0)

    @property
    def cost(self) -> float:
        return self.light_cost + self.core_cost


class TierResults(Value):
    """What a comparison found."""

    scenario: TwoTierScenario
    command: str
    at: str
    machine: str
    contenders: dict[str, str] = Field(min_length=1)
    runs: tuple[TierRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(sorted({run.load for run in self.runs}))

    def of(self, contender: str, load: float) -> tuple[TierRun, ...]:
        """In the order of seeds."""
        found = (run for run in self.runs if run.contender == contender and run.load == load)
        return tuple(sorted(found, key=lambda run: run.seed))


@dataclass(frozen=True)
class TierJob:
    """One run that is to be done."""

    scenario: TwoTierScenario
    contender: str
    seed: int
    load: float


def named(name: str) -> str:
    """Raises `ResplitError(INVALID_REQUEST)` for one that there is not."""
    if name not in KNOWN:
        message = f"there is no policy {name!r} in worlds of two tiers; there are {', '.join(KNOWN)}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "policies")
    return name


def jobs_of(scenario: TwoTierScenario, contenders: Sequence[str], seeds: Sequence[int]) -> list[TierJob]:
    return [TierJob(scenario, name, seed, load) for load in scenario.loads for seed in seeds for name in contenders]


def compare(
    scenario: TwoTierScenario,
    contenders: Sequence[str],
    seeds: Sequence[int],
    command: str,
    jobs: int,
    on_done: Callable[[TierRun], None],
    shelf: Shelf[TierRun] | None = None,
) -> TierResults:
    """Run them all; `on_done` hears of each run as it ends. What is on the `shelf` is not run again."""
    todo = jobs_of(scenario, contenders, seeds)
    runs = run_all(todo, run_one, jobs, lambda job, run: on_done(run), shelf, _made_of)
    return TierResults(
        scenario=scenario,
        command=command,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=platform.processor() or platform.machine(),
        contenders={name: KNOWN[name][1] for name in contenders},
        runs=tuple(runs),
    )


def run_one(job: TierJob) -> TierRun:
    """One run, in whichever process. Raises `ResplitError(INFEASIBLE)` where the core services fit nowhere."""
    scenario = job.scenario
    base = drawn(scenario, job.seed)
    sent = requests(scenario, base, job.load, job.seed)
    found = at_load(base, job.load)
    if job.contender == "cloud-only":
        found = with_cloud(scenario, found)
    contender = _made(job.contender, scenario, found)
    drain_slots = int(2.0 * scenario.deadline_ms[1] / scenario.slot_ms) + 1
    went = TierWorld(found, sent, contender, job.seed).run(scenario.warmup_slots, scenario.slots, drain_slots)
    whose = {"contender": job.contender, "seed": job.seed, "load": job.load, "trace_hash": trace_hash(sent)}
    return TierRun(**whose, **went.model_dump())


def _made_of(job: TierJob) -> tuple[str, ...]:
    return job.scenario.model_dump_json(), job.contender, str(job.seed), str(job.load)


def _made(name: str, scenario: TwoTierScenario, found: Drawn) -> Contender:
    made: Contender = KNOWN[name][0](scenario, found)
    return made

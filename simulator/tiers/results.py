"""Worlds of two tiers as a contest: who decides there, and what is looked at."""

from collections.abc import Callable, Iterator, Mapping

from simulator import plots
from simulator.contest import Column, Contest, ContestJob, ContestResults, ContestRun, Verdict
from simulator.contest_report import difference, mean_of, verdict
from simulator.statistics import Interval
from simulator.table import shown
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
TARGETS = {1.0: 95.0, 2.0: 90.0}
"""On time, by load."""


class TierRun(ContestRun, Went):
    """One run."""

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


Found = ContestResults[TwoTierScenario, TierRun]


def run_one(job: ContestJob[TwoTierScenario]) -> TierRun:
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


def _made(name: str, scenario: TwoTierScenario, found: Drawn) -> Contender:
    made: Contender = KNOWN[name][0](scenario, found)
    return made


def _held(found: Found, load: float) -> Iterator[Verdict]:
    ours = found.of(SYSTEM, load)

    def less(name: str, of: Callable[[TierRun], float]) -> Interval | None:
        return difference(ours, found.of(name, load), of)

    if (target := TARGETS.get(load)) is not None:
        reached = mean_of(ours, lambda run: run.on_time_percent)
        said = verdict(reached.low >= target, reached.high < target)
        yield f"load {load:g}: on time", f">= {target:g} %", shown(reached), said
    if cost := less(PAPER, lambda run: run.cost):
        said = verdict(cost.high <= 0.0, cost.low > 0.0)
        yield f"load {load:g}: cost, less the paper's", "<= 0", shown(cost, signed=True), said
    for name in found.contenders:
        if name == SYSTEM or (ahead := less(name, lambda run: run.on_time_percent)) is None:
            continue
        what = f"load {load:g}: on time, less that of {name}"
        if name == BOUND:
            yield what, ">= -3 points", shown(ahead, signed=True), verdict(ahead.low >= -3.0, ahead.high < -3.0)
        else:
            said = verdict(ahead.excludes_zero and ahead.mean > 0, ahead.excludes_zero and ahead.mean < 0)
            yield what, "> 0", shown(ahead, signed=True), said


def _rows(scenario: TwoTierScenario, run: TierRun) -> Mapping[str, str]:
    counts = {
        f"{task.name} {what}": str(each.get(task.name, 0))
        for task in scenario.tasks
        for what, each in (("arrived", run.arrived), ("on time", run.on_time))
    }
    figures = ["finished", "light_cost", "core_cost", "deployed", "decide_ms"]
    return {**counts, **{name: repr(getattr(run, name)) for name in figures}}


def _pictures(found: Found) -> Iterator[tuple[str, str, bytes]]:
    """Violins of what was on time, and what was late against cost."""
    for load in found.loads:
        values = {name: [run.on_time_percent for run in found.of(name, load)] for name in found.contenders}
        png = plots.violins(f"on time (%), load {load:g}", values, (SYSTEM, PAPER))
        yield f"on-time-{load:g}.png", f"Requests on time at load {load:g}", png
    points = {
        name: [(*_means(runs), f"{load:g}") for load in found.loads if (runs := found.of(name, load))]
        for name in found.contenders
    }
    yield "cost.png", "Late requests against cost, by load", plots.scatter("cost a slot", "late (%)", points)


def _means(runs: tuple[TierRun, ...]) -> tuple[float, float]:
    """Of cost, and of what is late, of which a thousandth is the least that is shown."""
    late = sum(100.0 - run.on_time_percent for run in runs) / len(runs)
    return sum(run.cost for run in runs) / len(runs), max(late, 0.1)


CONTEST = Contest[TwoTierScenario, TierRun](
    scenario=TwoTierScenario,
    kind=TierRun,
    where="in worlds of two tiers",
    contenders={name: title for name, (_, title) in KNOWN.items()},
    system=SYSTEM,
    run=run_one,
    columns={
        "on time %": Column(lambda run: run.on_time_percent, True),
        "on time, worst task %": Column(lambda run: run.worst_percent, True),
        "cost a slot": Column(lambda run: run.cost, False),
        "of this light": Column(lambda run: run.light_cost),
        "light instances made": Column(lambda run: run.deployed),
        "decision, ms of CPU": Column(lambda run: run.decide_ms),
    },
    held=_held,
    rows=_rows,
    pictures=_pictures,
    about=lambda scenario: (
        f"{scenario.slots} slots of {scenario.slot_ms} ms in which requests count, after {scenario.warmup_slots}; "
        f"every {scenario.steer_slots} slots is decided"
    ),
    note=(
        "On time: done by the deadline, of all that arrived. Cost: of keeping instances for a slot and of making new "
        "ones, by the paper's Table I; that of the core services is made once, spread over the run."
    ),
)

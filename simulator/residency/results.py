"""Worlds of many models as a contest: who decides there, and what is looked at."""

from collections.abc import Iterator, Mapping

from simulator import plots
from simulator.contest import Column, Contest, ContestJob, ContestResults, ContestRun, Verdict
from simulator.contest_report import difference, verdict
from simulator.residency.contenders import KNOWN
from simulator.residency.drawn import drawn, requests, trace_hash
from simulator.residency.scenario import ResidencyScenario
from simulator.residency.world import ResidencyWorld, Went
from simulator.table import shown

SYSTEM, BOUND = "full", "clairvoyant"


class ResidencyRun(ContestRun, Went):
    """One run."""

    seconds: float
    """That count."""

    @property
    def cost(self) -> float:
        """A second, in seconds of one request's waiting."""
        return (self.serving + self.keeping + self.energy + self.switching) / self.seconds

    @property
    def from_memory_percent(self) -> float:
        return 100.0 * self.from_memory / max(1, self.asked)

    @property
    def stalls_per_1000(self) -> float:
        return 1000.0 * self.stalls / max(1, self.asked)

    @property
    def cloud_percent(self) -> float:
        return 100.0 * self.cloud / max(1, self.asked)


Found = ContestResults[ResidencyScenario, ResidencyRun]


def run_one(job: ContestJob[ResidencyScenario]) -> ResidencyRun:
    """One run, in whichever process."""
    low, high = job.scenario.requests_per_s
    scenario = job.scenario.model_copy(update={"requests_per_s": (job.load * low, job.load * high)})
    found = drawn(scenario, job.seed)
    asked = requests(scenario, found, job.seed)
    keeper = KNOWN[job.contender].made(scenario, found, job.seed)
    went = ResidencyWorld(scenario, found, asked, keeper).run()
    whose = {"contender": job.contender, "seed": job.seed, "load": job.load, "trace_hash": trace_hash(asked)}
    return ResidencyRun(**whose, **went.model_dump(), seconds=scenario.duration_s)


def _held(found: Found, load: float) -> Iterator[Verdict]:
    ours = found.of(SYSTEM, load)
    for name in found.contenders:
        if name == SYSTEM or (more := difference(ours, found.of(name, load), lambda run: run.cost)) is None:
            continue
        what = f"load {load:g}: cost, less that of {name}"
        if name == BOUND:
            yield what, "-", shown(more, signed=True), "a bound of what is known, not a policy"
        else:
            yield what, "< 0", shown(more, signed=True), verdict(more.high < 0.0, more.low > 0.0)


def _rows(scenario: ResidencyScenario, run: ResidencyRun) -> Mapping[str, str]:
    return {name: repr(getattr(run, name)) for name in ("seconds", *Went.model_fields)}


def _pictures(found: Found) -> Iterator[tuple[str, str, bytes]]:
    """Violins of cost, and what was served from memory against what was fetched."""
    for load in found.loads:
        values = {name: [run.cost for run in found.of(name, load)] for name in found.contenders}
        png = plots.violins(f"cost a second, load {load:g}", values, (SYSTEM, BOUND))
        yield f"cost-{load:g}.png", f"Cost at load {load:g}", png
    points = {
        name: [(*_means(runs), f"{load:g}") for load in found.loads if (runs := found.of(name, load))]
        for name in found.contenders
    }
    png = plots.scatter("fetched (GB)", "not from memory (%)", points)
    yield "misses.png", "Requests that no memory served, against what was fetched, by load", png


def _means(runs: tuple[ResidencyRun, ...]) -> tuple[float, float]:
    missed = sum(100.0 - run.from_memory_percent for run in runs) / len(runs)
    return max(sum(run.fetched_gb for run in runs) / len(runs), 0.1), max(missed, 0.1)


CONTEST = Contest[ResidencyScenario, ResidencyRun](
    scenario=ResidencyScenario,
    kind=ResidencyRun,
    where="in worlds of many models",
    contenders={name: one.title for name, one in KNOWN.items()},
    system=SYSTEM,
    run=run_one,
    columns={
        "cost a second": Column(lambda run: run.cost, False),
        "latency ms": Column(lambda run: 1e3 * run.latency_s, False),
        "latency p95 ms": Column(lambda run: 1e3 * run.latency_p95_s, False),
        "from memory %": Column(lambda run: run.from_memory_percent, True),
        "stalls per 1,000": Column(lambda run: run.stalls_per_1000, False),
        "cloud %": Column(lambda run: run.cloud_percent),
        "fetched GB": Column(lambda run: run.fetched_gb, False),
        "loaded GB": Column(lambda run: run.loaded_gb, False),
        "decision, s of CPU": Column(lambda run: run.decide_s),
    },
    held=_held,
    rows=_rows,
    pictures=_pictures,
    about=lambda scenario: (
        f"{scenario.duration_s:g} s in which requests count, after {scenario.warmup_s:g}; what lies on disks is "
        f"decided every {scenario.disk_s:g} s, what is in memory every {scenario.memory_s:g} s and as it is needed"
    ),
    note=(
        "Cost, of a second: what requests waited and what those cost that went to the cloud, what lay on disks and in "
        "memories, energy, fetching and loading, all in seconds of one request's waiting. From memory: served by a "
        "server that had the model in memory. Stalls: requests that waited for their model to be loaded."
    ),
)

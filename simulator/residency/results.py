"""Worlds of many models as a contest: who decides there, and what is looked at."""

from collections.abc import Iterator, Mapping

from orchestrator.residency import program
from simulator import plots
from simulator.contest import Column, Contest, ContestJob, ContestResults, ContestRun, Verdict
from simulator.contest_report import difference, verdict
from simulator.residency.contenders import KNOWN
from simulator.residency.drawn import Drawn, drawn, rates, requests, trace_hash
from simulator.residency.scenario import ResidencyScenario
from simulator.residency.world import ResidencyWorld, Went
from simulator.table import shown

SYSTEM, BOUND = "full", "clairvoyant"


class ResidencyRun(ContestRun, Went):
    """One run."""

    seconds: float
    """That count."""
    bound: float | None = None
    """Of the clairvoyant's runs: what a second costs at least whoever knows rates and not requests, if changes cost
    nothing and nobody queued."""

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
    bound = lower_bound(scenario, found, job.seed) if job.contender == BOUND else None
    whose = {"contender": job.contender, "seed": job.seed, "load": job.load, "trace_hash": trace_hash(asked)}
    return ResidencyRun(**whose, **went.model_dump(), seconds=scenario.duration_s, bound=bound)


def lower_bound(scenario: ResidencyScenario, found: Drawn, seed: int) -> float:
    """The mean over the time that counts of linear programs, one for each span without a change of popularity."""
    told = rates(scenario, found, seed)
    start, end = scenario.warmup_s, scenario.warmup_s + scenario.duration_s
    ends = [*(at_s for at_s, _ in told[1:]), end]
    spans = [(min(until, end) - max(at_s, start), rate) for (at_s, rate), until in zip(told, ends, strict=True)]
    return sum(span * program.bound(found.setting(rate)) for span, rate in spans if span > 0.0) / scenario.duration_s


def _held(found: Found, load: float) -> Iterator[Verdict]:
    ours = found.of(SYSTEM, load)
    for name in found.contenders:
        if name == SYSTEM or (more := difference(ours, found.of(name, load), lambda run: run.cost)) is None:
            continue
        what = f"load {load:g}: cost, less that of {name}"
        if name == BOUND:
            yield what, "-", shown(more, signed=True), "knows what no policy does"
            yield f"load {load:g}: cost, more than the bound", "-", _above(ours, found.of(BOUND, load)), "published"
        else:
            yield what, "< 0", shown(more, signed=True), verdict(more.high < 0.0, more.low > 0.0)


def _above(ours: tuple[ResidencyRun, ...], told: tuple[ResidencyRun, ...]) -> str:
    """How far above the bound the cost is, in per cent, on the seeds of both."""
    bounds = {run.seed: run.bound for run in told}
    shares = [100.0 * (run.cost / bound - 1.0) for run in ours if (bound := bounds.get(run.seed))]
    return f"{sum(shares) / len(shares):.0f} % ({min(shares):.0f} to {max(shares):.0f})" if shares else "-"


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

"""A comparison of worlds of two tiers as a folder: one HTML file that needs nothing else, its plots, its runs as CSV,
and all of it as JSON."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from simulator import plots
from simulator.page import Picture, page
from simulator.statistics import Interval, mean_interval, paired_difference
from simulator.table import Grid, csv_rows, shown
from simulator.tiers.results import BOUND, PAPER, SYSTEM, TierResults, TierRun

SEED = 0
"""Of the resamples."""
Of = Callable[[TierRun], float]
COLUMNS: dict[str, tuple[Of, bool | None]] = {
    "on time %": (lambda run: run.on_time_percent, True),
    "on time, worst task %": (lambda run: run.worst_percent, True),
    "cost a slot": (lambda run: run.cost, False),
    "of this light": (lambda run: run.light_cost, None),
    "light instances made": (lambda run: run.deployed, None),
    "decision, ms of CPU": (lambda run: run.decide_ms, None),
}
"""With whether more is better; None where neither is, in itself."""
TARGETS = {1.0: 95.0, 2.0: 90.0}
"""On time, by load."""


def write(folder: Path, found: TierResults) -> list[Path]:
    """Write results.json, results.csv, tables.csv, the plots and report.html into `folder`, made if it is not there.
    Raises `ResplitError` if matplotlib is missing: what needs no plots is written by then."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(found.model_dump_json(indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(run_rows(found))
    grids = [verdicts(found), *(grid(found, load) for load in found.loads)]
    with (folder / "tables.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row for each in grids for row in ([each.title], *csv_rows(each), []))
    drawn = pictures(found)
    for picture in drawn:
        (folder / picture.name).write_bytes(picture.png)
    rendered = page("tiers/report.html.j2", found=found, grids=grids, pictures=drawn, hashes=hashes(found))
    (folder / "report.html").write_text(rendered, encoding="utf-8")
    names = ("report.html", "results.csv", "tables.csv", "results.json")
    return [folder / name for name in (*names, *(each.name for each in drawn))]


def run_rows(found: TierResults) -> list[list[str]]:
    """One row per run with all there is, the header first."""
    tasks = [task.name for task in found.scenario.tasks]
    counted = [f"{task} {what}" for task in tasks for what in ("arrived", "on time")]
    figures = ["finished", "light_cost", "core_cost", "deployed", "decide_ms"]
    rows = [["contender", "seed", "load", "trace_hash", *counted, *figures]]
    for run in found.runs:
        counts = [str(each.get(task, 0)) for task in tasks for each in (run.arrived, run.on_time)]
        values = [repr(getattr(run, name)) for name in figures]
        rows.append([run.contender, str(run.seed), f"{run.load:g}", run.trace_hash, *counts, *values])
    return rows


def grid(found: TierResults, load: float) -> Grid:
    """Every contender at a load, and how it differs from ours over the same worlds."""
    ours = found.of(SYSTEM, load)
    rows = []
    for name in found.contenders:
        runs = found.of(name, load)
        cells = [_cell(runs, () if name == SYSTEM else ours, *column) for column in COLUMNS.values()]
        rows.append((f"{name} (reference)" if name == SYSTEM else name, *cells))
    return Grid(f"Load {load:g}: {len(found.seeds)} seeds, against {SYSTEM}", ("policy", *COLUMNS), tuple(rows))


def _cell(runs: Sequence[TierRun], ours: Sequence[TierRun], of: Of, more_is_better: bool | None) -> str:
    text = shown(mean_interval([of(run) for run in runs], SEED))
    if (against := difference(runs, ours, of)) is None:
        return text
    word = ""
    if more_is_better is not None and against.excludes_zero:
        word = " better" if (against.mean > 0) == more_is_better else " worse"
    return f"{text}\n{shown(against, signed=True)}{word}"


def difference(runs: Sequence[TierRun], others: Sequence[TierRun], of: Of) -> Interval | None:
    """How much higher it is in `runs`, over the worlds in which both were."""
    by_world = {(run.seed, run.trace_hash): of(run) for run in others}
    pairs = [(of(run), by_world[key]) for run in runs if (key := (run.seed, run.trace_hash)) in by_world]
    return paired_difference([a for a, _ in pairs], [b for _, b in pairs], SEED) if pairs else None


def verdicts(found: TierResults) -> Grid:
    """What is aimed at, and what came of it."""
    rows = [row for load in found.loads if found.of(SYSTEM, load) for row in _held(found, load)]
    return Grid("What is aimed at", ("figure", "target", "found", "verdict"), tuple(rows))


def _held(found: TierResults, load: float) -> Iterator[tuple[str, str, str, str]]:
    ours = found.of(SYSTEM, load)

    def less(name: str, of: Of) -> Interval | None:
        return difference(ours, found.of(name, load), of)

    if (target := TARGETS.get(load)) is not None:
        reached = mean_interval([run.on_time_percent for run in ours], SEED)
        verdict = _verdict(reached.low >= target, reached.high < target)
        yield f"load {load:g}: on time", f">= {target:g} %", shown(reached), verdict
    if cost := less(PAPER, lambda run: run.cost):
        verdict = _verdict(cost.high <= 0.0, cost.low > 0.0)
        yield f"load {load:g}: cost, less the paper's", "<= 0", shown(cost, signed=True), verdict
    for name in found.contenders:
        if name == SYSTEM or (ahead := less(name, lambda run: run.on_time_percent)) is None:
            continue
        what = f"load {load:g}: on time, less that of {name}"
        if name == BOUND:
            yield what, ">= -3 points", shown(ahead, signed=True), _verdict(ahead.low >= -3.0, ahead.high < -3.0)
        else:
            verdict = _verdict(ahead.excludes_zero and ahead.mean > 0, ahead.excludes_zero and ahead.mean < 0)
            yield what, "> 0", shown(ahead, signed=True), verdict


def _verdict(met: bool, missed: bool) -> str:
    return "met" if met else "missed" if missed else "not shown"


def pictures(found: TierResults) -> list[Picture]:
    """Violins of what was on time, and what was late against cost."""
    drawn = []
    for load in found.loads:
        values = {name: [run.on_time_percent for run in found.of(name, load)] for name in found.contenders}
        png = plots.violins(f"on time (%), load {load:g}", values, (SYSTEM, PAPER))
        drawn.append(Picture(f"on-time-{load:g}.png", f"Requests on time at load {load:g}", png))
    points = {
        name: [(*_means(runs), f"{load:g}") for load in found.loads if (runs := found.of(name, load))]
        for name in found.contenders
    }
    png = plots.scatter("cost a slot", "late (%)", points)
    drawn.append(Picture("cost.png", "Late requests against cost, by load", png))
    return drawn


def _means(runs: Sequence[TierRun]) -> tuple[float, float]:
    """Of cost, and of what is late, of which a thousandth is the least that is shown."""
    late = sum(100.0 - run.on_time_percent for run in runs) / len(runs)
    return sum(run.cost for run in runs) / len(runs), max(late, 0.1)


def hashes(found: TierResults) -> list[tuple[int, float, str]]:
    """By seed and load, the hash of everything that was drawn."""
    return sorted({(run.seed, run.load, run.trace_hash) for run in found.runs})

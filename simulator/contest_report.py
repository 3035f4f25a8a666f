"""A contest as a folder: one HTML file that needs nothing else, its plots, its runs as CSV, and all of it as JSON."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from simulator.contest import Column, Contest, ContestResults, R, S
from simulator.page import Picture, page
from simulator.statistics import Interval, mean_interval, paired_difference
from simulator.table import Grid, csv_rows, shown

SEED = 0
"""Of the resamples."""


def write(contest: Contest[S, R], folder: Path, found: ContestResults[S, R]) -> list[Path]:
    """Write results.json, results.csv, tables.csv, the plots and report.html into `folder`, made if it is not there.
    Raises `ResplitError` if matplotlib is missing: what needs no plots is written by then."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(found.model_dump_json(indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(run_rows(contest, found))
    tables = grids(contest, found)
    with (folder / "tables.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row for each in tables for row in ([each.title], *csv_rows(each), []))
    drawn = [Picture(*one) for one in contest.pictures(found)]
    for picture in drawn:
        (folder / picture.name).write_bytes(picture.png)
    rendered = page("contest.html.j2", contest=contest, found=found, grids=tables, pictures=drawn, hashes=hashes(found))
    (folder / "report.html").write_text(rendered, encoding="utf-8")
    names = ("report.html", "results.csv", "tables.csv", "results.json")
    return [folder / name for name in (*names, *(each.name for each in drawn))]


def run_rows(contest: Contest[S, R], found: ContestResults[S, R]) -> list[list[str]]:
    """One row per run with all there is, the header first."""
    rows: list[list[str]] = []
    for run in found.runs:
        more = contest.rows(found.scenario, run)
        rows = rows or [["contender", "seed", "load", "trace_hash", *more]]
        rows.append([run.contender, str(run.seed), f"{run.load:g}", run.trace_hash, *more.values()])
    return rows


def grids(contest: Contest[S, R], found: ContestResults[S, R]) -> list[Grid]:
    """What is aimed at, and each load."""
    return [verdicts(contest, found), *(grid(contest, found, load) for load in found.loads)]


def verdicts(contest: Contest[S, R], found: ContestResults[S, R]) -> Grid:
    """What is aimed at, and what came of it."""
    rows = [row for load in found.loads if found.of(contest.system, load) for row in contest.held(found, load)]
    return Grid("What is aimed at", ("figure", "target", "found", "verdict"), tuple(rows))


def grid(contest: Contest[S, R], found: ContestResults[S, R], load: float) -> Grid:
    """Every contender at a load, and how it differs from ours over the same worlds."""
    ours = found.of(contest.system, load)
    rows = []
    for name in found.contenders:
        runs = found.of(name, load)
        cells = [_cell(runs, () if name == contest.system else ours, column) for column in contest.columns.values()]
        rows.append((f"{name} (reference)" if name == contest.system else name, *cells))
    title = f"Load {load:g}: {len(found.seeds)} seeds, against {contest.system}"
    return Grid(title, ("policy", *contest.columns), tuple(rows))


def _cell(runs: Sequence[R], ours: Sequence[R], column: Column[R]) -> str:
    text = shown(mean_of(runs, column.of))
    if (against := difference(runs, ours, column.of)) is None:
        return text
    word = ""
    if column.more_is_better is not None and against.excludes_zero:
        word = " better" if (against.mean > 0) == column.more_is_better else " worse"
    return f"{text}\n{shown(against, signed=True)}{word}"


def mean_of(runs: Sequence[R], of: Callable[[R], float]) -> Interval:
    return mean_interval([of(run) for run in runs], SEED)


def difference(runs: Sequence[R], others: Sequence[R], of: Callable[[R], float]) -> Interval | None:
    """How much higher it is in `runs`, over the worlds in which both were."""
    by_world = {(run.seed, run.trace_hash): of(run) for run in others}
    pairs = [(of(run), by_world[key]) for run in runs if (key := (run.seed, run.trace_hash)) in by_world]
    return paired_difference([a for a, _ in pairs], [b for _, b in pairs], SEED) if pairs else None


def verdict(met: bool, missed: bool) -> str:
    return "met" if met else "missed" if missed else "not shown"


def hashes(found: ContestResults[S, R]) -> list[tuple[int, float, str]]:
    """By seed and load, the hash of everything that was drawn."""
    return sorted({(run.seed, run.load, run.trace_hash) for run in found.runs})

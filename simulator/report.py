"""A comparison as a folder that people and programs read: one HTML file that needs nothing else, its plots as PNG, its
runs as CSV, and all of it as JSON."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.decision import Action
from simulator import optimality, plots, table, verdicts
from simulator.metrics import ClassMetrics, Metrics, actions
from simulator.page import Picture, page
from simulator.results import Results, Run, Timeline, save
from simulator.shortcomings import shortcomings
from simulator.statistics import Interval
from simulator.table import BY_KEY, SERVED, SPENT, Grid, compare, interval, shown

DECISIONS_SHOWN = 200
"""Of one run; results.json has all of them."""
SEED = 0
"""Of the resamples: the intervals are the same however often they are reckoned."""
PLOTTED = ("qos_percent", "latency_ms_p95", "goodput_utilisation_percent", "incidents_per_hour", "energy_j", "phi")
GROUPS = {
    "Quality of service and downtime": (
        "qos_percent",
        "qos_worst_percent",
        "incidents_per_hour",
        "incidents_per_fault",
        "down_s_per_hour",
        "down_s_max",
        "mttr_s",
        "violations",
        "exposed_percent",
    ),
    "Latency": ("latency_ms_mean", "latency_ms_p50", "latency_ms_p95", "latency_ms_p99"),
    "First token, and those after it": (
        *("ttft_ms_p50", "ttft_ms_p95", "ttft_ms_p99"),
        *("tpot_ms_p50", "tpot_ms_p95", "tpot_ms_p99"),
    ),
    "Utilisation, beside latency": (
        "latency_ms_p95",
        "utilisation_percent",
        "goodput_utilisation_percent",
        "jain",
        "memory_percent",
        "memory_peak_percent",
        "energy_j",
    ),
    "Reconfiguration": (
        "reconfigurations_per_hour",
        "kept_per_hour",
        "redistributes_per_hour",
        "resplits_per_hour",
        "routes_per_hour",
        "aborts",
        "moved_gb",
        "transition_ms_p50",
        "transition_ms_p95",
    ),
    "Planning": ("phi", "phi_bound", "gap_percent", "planner_s"),
}
"""Every metric is in one of the tables."""
CLASS_COLUMNS: dict[str, Callable[[ClassMetrics], float | None]] = {
    "arrived": lambda c: c.arrived,
    "QoS %": lambda c: None if c.qos is None else 100 * c.qos,
    "latency p50 ms": lambda c: c.latency_ms.p50 if c.latency_ms else None,
    "latency p95 ms": lambda c: c.latency_ms.p95 if c.latency_ms else None,
    "TTFT p95 ms": lambda c: c.ttft_ms.p95 if c.ttft_ms else None,
    "TPOT p95 ms": lambda c: c.tpot_ms.p95 if c.tpot_ms else None,
    "downtime incidents": lambda c: c.incidents,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One point of a sweep, or all there is."""

    title: str
    seed_rows: Grid
    tables: tuple[Grid, ...]


def write(folder: Path, found: Results) -> list[Path]:
    """Write results.json, results.csv, tables.csv, the plots and report.html into `folder`, made if it is not there, in
    place of those that are. Raises `ResplitError` if matplotlib is missing: what needs no plots is written by then."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "results.json", found)
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table.run_rows(found.runs))
    made = parts(found)
    with (folder / "tables.csv").open("w", newline="") as file:
        csv.writer(file).writerows(_stacked(made))
    drawn = pictures(found)
    for picture in drawn:
        (folder / picture.name).write_bytes(picture.png)
    (folder / "report.html").write_text(html(found, made, drawn), encoding="utf-8")
    names = ("report.html", "results.csv", "tables.csv", "results.json")
    return [folder / name for name in (*names, *(each.name for each in drawn))]


def _stacked(made: Sequence[Part]) -> Iterator[list[str]]:
    """All tables as rows of one file, each under its title and with an empty row below it."""
    for part in made:
        for each in (part.seed_rows, *part.tables):
            yield from ([f"{each.title}, {part.title}" if part.title else each.title], *table.csv_rows(each), [])


def html(found: Results, made: Sequence[Part], drawn: Sequence[Picture]) -> str:
    """The report as one page that asks nothing of a network and runs no script."""
    return page(
        "report.html.j2",
        found=found,
        parts=made,
        pictures=drawn,
        shortcomings=shortcomings(found, SEED),
        worlds=worlds(found),
        decisions=[(each, decisions(each), len(each.epochs)) for each in found.shown],
        scenario=found.scenario.model_dump_json(indent=2, exclude_defaults=True),
        events=sum(run.events for run in found.runs),
        wall_s=sum(run.wall_s for run in found.runs),
    )


def parts(found: Results) -> list[Part]:
    """The tables, of every point of a sweep for itself."""
    made = []
    for point in sorted({run.point for run in found.runs}):
        runs = [run for run in found.runs if run.point == point]
        title = ", ".join(f"{key} = {value:g}" for key, value in point)
        made.append(Part(title, seed_grid(found, runs), tuple(_tables(found, runs))))
    return made


def seed_grid(found: Results, runs: Sequence[Run], reasons: bool = True) -> Grid:
    """The seed's own rows with their verdicts."""
    static, system = ([run for run in runs if run.policy == name] for name in (found.reference, found.system))
    return verdicts.grid(verdicts.seed_rows(static, system, SEED), 'The paper\'s "Expected Results"', reasons)


def headline(found: Results, runs: Sequence[Run]) -> tuple[Grid, Grid]:
    """What a terminal shows of a comparison: how requests were served, and what was spent on it."""
    title = f"{found.scenario.title}: {len({run.seed for run in runs})} seeds, against {found.reference}"
    served, spent = (_grid(found, runs, keys, title) for keys in (SERVED, SPENT))
    return served, spent


def _tables(found: Results, runs: Sequence[Run]) -> list[Grid]:
    groups = (_grid(found, runs, keys, title) for title, keys in GROUPS.items())
    return [*groups, optimality.grid(found, runs, SEED), class_grid(found, runs)]


def _grid(found: Results, runs: Sequence[Run], keys: Sequence[str], title: str) -> Grid:
    columns = [BY_KEY[key] for key in keys]
    return table.grid(compare(runs, list(found.policies), found.reference, columns, SEED), title)


def class_grid(found: Results, runs: Sequence[Run]) -> Grid:
    """Every class of requests under every policy."""
    rows = []
    for policy in found.policies:
        own = [run for run in runs if run.policy == policy]
        for each in found.scenario.workload.classes:
            cells = [interval(own, _of_class(str(each.name), of), SEED) for of in CLASS_COLUMNS.values()]
            rows.append((f"{policy}: {each.name}", *(shown(cell) for cell in cells)))
    return Grid("By class of requests", ("policy: class", *CLASS_COLUMNS), tuple(rows))


def _of_class(name: str, of: Callable[[ClassMetrics], float | None]) -> Callable[[Metrics], float | None]:
    return lambda metrics: next((of(each) for each in metrics.classes if each.name == name), None)


def pictures(found: Results) -> list[Picture]:
    """Bars, or curves in a sweep; and of every run that is shown its latency and its blocks over time."""
    swept = {key: {run.swept[key] for run in found.runs if key in run.swept} for run in found.runs for key in run.swept}
    drawn: list[Picture] = []
    for column in (BY_KEY[key] for key in PLOTTED):
        for key in (key for key, values in swept.items() if len(values) > 1):
            png = plots.curve(column.title, key, _lines(found, key, column.of))
            drawn.append(Picture(f"curve-{_part(key)}-{column.key}.png", f"{column.title} over {key}", png))
        if not swept:
            values = {name: interval(found.of(name), column.of, SEED) for name in found.policies}
            if any(value is not None for value in values.values()):
                png = plots.bars(column.title, values, (found.system, found.reference))
                drawn.append(Picture(f"bars-{column.key}.png", column.title, png))
    for number, each in enumerate(found.shown, 1):
        name = f"{number}-{_part(each.policy)}.png"
        of = f"{each.policy}, seed {each.seed}"
        drawn.append(Picture(f"timeline-{name}", f"Latency over time: {of}", plots.timeline(each)))
        drawn.append(Picture(f"gantt-{name}", f"Blocks over nodes: {of}", plots.gantt(each)))
    return drawn


def _lines(found: Results, key: str, of: table.Of) -> Mapping[str, Sequence[tuple[float, Interval]]]:
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for name in found.policies:
        runs = [run for run in found.of(name) if key in run.swept]
        for value in sorted({run.swept[key] for run in runs}):
            here = interval([run for run in runs if run.swept[key] == value], of, SEED)
            if here is not None:
                lines.setdefault(name, []).append((value, here))
    return lines


def decisions(run: Timeline) -> list[tuple[float, int, str, str, str]]:
    """What was decided in a run, as far as it came into force: when, the epoch, what it was, its cause and its
    reason."""
    first = [(epoch, None) for epoch in run.epochs[:1]]
    made: list[tuple[float, int, str, str, str]] = []
    for epoch, action in [*first, *actions(run.epochs)][:DECISIONS_SHOWN]:
        what = "first plan" if action is None else "re-split" if action is Action.RESPLIT else str(action)
        made.append((epoch.begin_s, epoch.epoch, what, epoch.cause, epoch.reason))
    return made


def worlds(found: Results) -> list[tuple[int, str, str]]:
    """By seed, and by point of a sweep, the hash of everything that was drawn."""
    seen = {(run.seed, run.point, run.trace_hash) for run in found.runs}
    return [
        (seed, ", ".join(f"{key} = {value:g}" for key, value in point), trace) for seed, point, trace in sorted(seen)
    ]


def _part(name: str) -> str:
    """A name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)

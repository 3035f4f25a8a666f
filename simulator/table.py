"""PURE: policies side by side: a row for each, a column for each metric, with intervals and the paired difference from
a reference; the same grid for the terminal, for Markdown and for CSV."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from simulator.metrics import Metrics, Quantiles
from simulator.results import Run
from simulator.statistics import Interval, mean_interval, paired_difference

Better = Literal["lower", "higher"]
Of = Callable[[Metrics], float | None]


@dataclass(frozen=True, slots=True)
class Column:
    """A metric as it is shown."""

    key: str
    """Its name in CSV files, the unit last."""
    title: str
    better: Better | None
    """None where neither is, in itself."""
    of: Of


def _of(which: Callable[[Metrics], Quantiles | None], name: Literal["mean", "p50", "p95", "p99"]) -> Of:
    def value(metrics: Metrics) -> float | None:
        times = which(metrics)
        return None if times is None else float(getattr(times, name))

    return value


def percent(of: Of) -> Of:
    """A share as a percentage."""

    def value(metrics: Metrics) -> float | None:
        share = of(metrics)
        return None if share is None else 100 * share

    return value


COLUMNS = (
    Column("qos_percent", "QoS %", "higher", percent(lambda m: m.qos)),
    Column("qos_worst_percent", "QoS, worst class %", "higher", percent(lambda m: m.qos_worst)),
    Column("latency_ms_p50", "latency p50 ms", "lower", _of(lambda m: m.latency_ms, "p50")),
    Column("latency_ms_p95", "latency p95 ms", "lower", _of(lambda m: m.latency_ms, "p95")),
    Column("latency_ms_p99", "latency p99 ms", "lower", _of(lambda m: m.latency_ms, "p99")),
    Column("latency_ms_mean", "latency mean ms", "lower", _of(lambda m: m.latency_ms, "mean")),
    Column("ttft_ms_p50", "TTFT p50 ms", "lower", _of(lambda m: m.ttft_ms, "p50")),
    Column("ttft_ms_p95", "TTFT p95 ms", "lower", _of(lambda m: m.ttft_ms, "p95")),
    Column("ttft_ms_p99", "TTFT p99 ms", "lower", _of(lambda m: m.ttft_ms, "p99")),
    Column("tpot_ms_p50", "TPOT p50 ms", "lower", _of(lambda m: m.tpot_ms, "p50")),
    Column("tpot_ms_p95", "TPOT p95 ms", "lower", _of(lambda m: m.tpot_ms, "p95")),
    Column("tpot_ms_p99", "TPOT p99 ms", "lower", _of(lambda m: m.tpot_ms, "p99")),
    Column("utilisation_percent", "utilisation %", "higher", percent(lambda m: m.utilisation)),
    Column("goodput_utilisation_percent", "goodput utilisation %", "higher", percent(lambda m: m.goodput_utilisation)),
    Column("jain", "Jain index", "higher", lambda m: m.jain),
    Column("memory_percent", "memory %", None, percent(lambda m: m.memory)),
    Column("memory_peak_percent", "memory, fullest %", None, percent(lambda m: m.memory_peak)),
    Column("incidents_per_hour", "downtime incidents /h", "lower", lambda m: m.incidents_per_hour),
    Column("incidents_per_fault", "incidents per fault", "lower", lambda m: m.incidents_per_fault),
    Column("down_s_per_hour", "down s/h", "lower", lambda m: m.down_s_per_hour),
    Column("down_s_max", "longest incident s", "lower", lambda m: m.down_s_max),
    Column("mttr_s", "MTTR s", "lower", lambda m: m.mttr_s),
    Column("violations", "violations", "lower", lambda m: m.violations),
    Column("exposed_percent", "exposed %", "lower", percent(lambda m: m.exposed)),
    Column("reconfigurations_per_hour", "reconfigurations /h", None, lambda m: m.reconfigurations_per_hour),
    Column("kept_per_hour", "kept /h", None, lambda m: m.kept_per_hour),
    Column("redistributes_per_hour", "redistributed /h", None, lambda m: m.redistributes_per_hour),
    Column("resplits_per_hour", "re-split /h", None, lambda m: m.resplits_per_hour),
    Column("routes_per_hour", "routes changed /h", None, lambda m: m.routes_per_hour),
    Column("aborts", "aborts", "lower", lambda m: m.aborts),
    Column("moved_gb", "moved GB", "lower", lambda m: m.moved_bytes / 1e9),
    Column("planner_s", "planner CPU s", "lower", lambda m: m.planner_s),
    Column("gap_percent", "optimality gap %", "lower", percent(lambda m: m.gap)),
    Column("transition_ms_p50", "in transition p50 ms", "lower", _of(lambda m: m.transition_ms, "p50")),
    Column("transition_ms_p95", "in transition p95 ms", "lower", _of(lambda m: m.transition_ms, "p95")),
    Column("energy_j", "energy J/request", "lower", lambda m: m.energy_j),
    Column("phi", "Phi", "lower", lambda m: m.phi),
    Column("phi_bound", "Phi of free switching (a bound, not a policy)", None, lambda m: m.phi_bound),
)
"""All of them; utilisation stands beside latency wherever it is shown."""

BY_KEY = {column.key: column for column in COLUMNS}
SERVED = ("qos_percent", "qos_worst_percent", "latency_ms_p50", "latency_ms_p95", "incidents_per_hour")
SPENT = ("goodput_utilisation_percent", "reconfigurations_per_hour", "energy_j", "phi")
HEADLINE = tuple(BY_KEY[key] for key in (*SERVED, *SPENT))
"""What is looked at first; each half as wide as a terminal."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one policy. None where no run of it has the metric."""

    value: Interval | None
    against: Interval | None
    """Less that of the reference, over the worlds that both were run in."""
    better: Better | None

    @property
    def word(self) -> str:
        """What the difference comes to: `better`, `worse`, `differs`, or nothing if it may be chance."""
        if self.against is None or not self.against.excludes_zero:
            return ""
        if self.better is None:
            return "differs"
        return "better" if (self.against.mean > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Policies by metrics."""

    reference: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    """The policy, and a cell for each column."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of text. The first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compare(
    runs: Sequence[Run], policies: Sequence[str], reference: str, columns: Sequence[Column], seed: int
) -> Comparison:
    """Every policy's metrics, and how they differ from those of `reference`. `seed` draws the resamples."""
    held = [run for run in runs if run.policy == reference]
    rows = []
    for policy in policies:
        own = [run for run in runs if run.policy == policy]
        cells = tuple(
            Cell(
                interval(own, column.of, seed),
                None if policy == reference else paired(own, held, column.of, seed),
                column.better,
            )
            for column in columns
        )
        rows.append((policy, cells))
    return Comparison(reference, tuple(columns), tuple(rows))


def interval(runs: Sequence[Run], of: Of, seed: int) -> Interval | None:
    """The mean of a metric over those runs that have it."""
    values = [value for run in runs if (value := of(run.metrics)) is not None]
    return mean_interval(values, seed) if values else None


def paired(a: Sequence[Run], b: Sequence[Run], of: Of, seed: int) -> Interval | None:
    """How much higher a metric is in `a` than in `b`, over the worlds in which both have it. Runs of one seed that
    drew different worlds are no pair."""
    others = {run.world: value for run in b if (value := of(run.metrics)) is not None}
    pairs = [(value, others[run.world]) for run in a if run.world in others and (value := of(run.metrics)) is not None]
    return paired_difference([x for x, _ in pairs], [y for _, y in pairs], seed) if pairs else None


def grid(comparison: Comparison, title: str) -> Grid:
    """The comparison as text: in each cell the mean with its interval and, below, the difference and what it is."""
    header = ("policy", *(column.title for column in comparison.columns))
    rows = []
    for policy, cells in comparison.rows:
        mark = " (reference)" if policy == comparison.reference else ""
        rows.append((policy + mark, *(_cell(cell) for cell in cells)))
    return Grid(title, header, tuple(rows))


def _cell(cell: Cell) -> str:
    if cell.against is None:
        return shown(cell.value)
    return f"{shown(cell.value)}\n{shown(cell.against, signed=True)} {cell.word}".rstrip()


def shown(found: Interval | None, signed: bool = False) -> str:
    """`12.3 [11.9, 12.8]`, with as many decimals as its size asks for; `12.3` where all seeds agree, or there is one;
    `-` for nothing."""
    if found is None:
        return "-"
    size = max(abs(found.low), abs(found.high), abs(found.mean))
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    sign = "+" if signed else ""
    if not size:
        return "0"
    mean, low, high = (f"{value:{sign},.{decimals}f}" for value in (found.mean, found.low, found.high))
    return mean if mean == low == high else f"{mean} [{low}, {high}]"


def terminal(table: Grid) -> Table:
    """For a person at a terminal."""
    made = Table(title=Text(table.title), show_lines=True)
    for number, name in enumerate(table.header):
        made.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        made.add_row(*(Text(cell) for cell in row))  # no markup: an interval has brackets
    return made


def markdown(table: Grid) -> list[str]:
    """The lines of a Markdown table."""
    aligned = ["---", *("---:" for _ in table.header[1:])]
    lines = [table.header, tuple(aligned), *table.rows]
    return ["| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines]


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", "<br>")


def csv_rows(table: Grid) -> list[list[str]]:
    """The rows of a CSV file, the header first."""
    return [list(table.header), *([cell.replace("\n", "; ") for cell in row] for row in table.rows)]


def run_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row per policy and seed with every metric in full, the header first: what a reader can reckon with."""
    keys = sorted({key for run in runs for key in run.swept})
    header = ["policy", "seed", "trace_hash", *keys, "arrived", "completed", *BY_KEY, "finished"]
    rows = [header]
    for run in runs:
        values = [column.of(run.metrics) for column in COLUMNS]
        counts = [str(run.metrics.arrived), str(run.metrics.completed)]
        swept = [repr(run.swept[key]) if key in run.swept else "" for key in keys]
        figures = ["" if value is None else repr(float(value)) for value in values]
        rows.append([run.policy, str(run.seed), run.trace_hash, *swept, *counts, *figures, run.finished])
    return rows

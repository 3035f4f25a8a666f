"""PURE: the paper's table of "Expected Results" beside what was found, and by which rule a figure counts as reproduced.

The paper gives a range for a static and for an adaptive system and no method (mathematics.md, part D), so the rule is
ours, and strict: what is reached must be reached with certainty, and by adapting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from simulator.results import Run
from simulator.statistics import PAIRS_MIN, Interval
from simulator.table import Better, Grid, Of, interval, paired, percent, shown

Word = Literal["reproduced", "beaten", "not reproduced"]
Level = Literal["low", "moderate", "high"]
LEVELS: tuple[Level, ...] = ("low", "moderate", "high")


@dataclass(frozen=True, slots=True)
class Verdict:
    word: Word
    why: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the paper's table, and what of ours it is held against."""

    title: str
    unit: str
    static: tuple[float, float]
    """The paper's range for a static system, its worse end first."""
    adaptive: tuple[float, float]
    better: Better
    of: Of


@dataclass(frozen=True, slots=True)
class SeedRow:
    """One row of the seed's table. The intervals are None where no run has the figure."""

    title: str
    paper_static: str
    paper_adaptive: str
    static: str
    system: str
    gain: str
    """The system's value less that of the static optimum."""
    static_verdict: Verdict | None
    system_verdict: Verdict | None


LATENCY, UTILISATION = ((1000.0, 500.0), (300.0, 100.0)), ((50.0, 60.0), (80.0, 95.0))
FIGURES = (
    Figure("latency, p50", "ms", *LATENCY, "lower", lambda m: m.latency_ms.p50 if m.latency_ms else None),
    Figure("latency, p95", "ms", *LATENCY, "lower", lambda m: m.latency_ms.p95 if m.latency_ms else None),
    Figure("utilisation", "%", *UTILISATION, "higher", percent(lambda m: m.utilisation)),
    Figure("goodput utilisation", "%", *UTILISATION, "higher", percent(lambda m: m.goodput_utilisation)),
    Figure("downtime incidents", "/h", (10.0, 5.0), (2.0, 0.0), "lower", lambda m: m.incidents_per_hour),
    Figure("QoS compliance", "%", (60.0, 70.0), (95.0, 99.0), "higher", percent(lambda m: m.qos)),
)
"""The paper does not say of what its latency is, nor what counts as used, so both readings stand."""


def verdict(ours: Interval, paper: tuple[float, float], better: Better, gain: Interval | None = None) -> Verdict:
    """Whether `ours` is what the paper expects, `paper` being its range, the worse end first.

    - *reproduced*: the whole 95 % interval is at least as good as the worse end of the range;
    - *beaten*: the whole interval is better than its better end;
    - *not reproduced*: neither, or where `gain` (ours less the static optimum's, pair by pair) is given, it is not an
      improvement whose interval excludes 0: then it is not adapting that brings it.
    """
    sign = 1.0 if better == "higher" else -1.0
    worst = min(sign * ours.low, sign * ours.high)
    worse_end, better_end = (sign * end for end in paper)
    if worst < worse_end:
        return Verdict("not reproduced", "short of the paper's range")
    if gain is not None and (why := _no_gain(gain, sign)):
        return Verdict("not reproduced", why)
    if worst > better_end:
        return Verdict("beaten", "better than the paper's range")
    return Verdict("reproduced", "within the paper's range, or better")


def _no_gain(gain: Interval, sign: float) -> str:
    """Why a gain is none, or nothing."""
    if gain.count < PAIRS_MIN:
        return f"the level is reached, but {gain.count} seeds cannot tell it from the static optimum"
    if not gain.excludes_zero:
        return "the level is reached, but the static optimum does as well"
    return "" if sign * gain.mean > 0 else "the level is reached, but the static optimum does better"


def privacy_level(runs: Sequence[Run]) -> Level:
    """The paper's words, as far as a run can tell: *high* if no run broke an invariant and no request's state reached
    an untrusted node; *moderate* if some did, but no invariant broke; else *low*."""
    if any(run.metrics.violations for run in runs):
        return "low"
    return "moderate" if any(run.metrics.exposed for run in runs) else "high"


def privacy_verdict(ours: Level, paper: Level, static: Level | None = None) -> Verdict:
    """As `verdict`, of words: *beaten* is a level higher than the paper's, and `static` the level to be above."""
    if LEVELS.index(ours) < LEVELS.index(paper):
        return Verdict("not reproduced", f"{ours} where the paper expects {paper}")
    if static is not None and LEVELS.index(static) >= LEVELS.index(ours):
        return Verdict("not reproduced", f"the level is reached, but the static optimum is {static} as well")
    if LEVELS.index(ours) > LEVELS.index(paper):
        return Verdict("beaten", f"{ours} where the paper expects {paper}")
    return Verdict("reproduced", f"{ours}, as the paper expects")


def seed_rows(static: Sequence[Run], system: Sequence[Run], seed: int) -> tuple[SeedRow, ...]:
    """The seed's own rows: of the static optimum and of the full system, on the same seeds."""
    rows = [_row(figure, static, system, seed) for figure in FIGURES]
    if static and system:
        was, now = privacy_level(static), privacy_level(system)
        exposed = [_exposed(runs) for runs in (static, system)]
        verdicts = privacy_verdict(was, "moderate"), privacy_verdict(now, "high", was)
        cells = f"{was} ({exposed[0]})", f"{now} ({exposed[1]})", "-"
        rows.append(SeedRow("privacy", "moderate", "high", *cells, *verdicts))
    return tuple(rows)


def _row(figure: Figure, static: Sequence[Run], system: Sequence[Run], seed: int) -> SeedRow:
    was, now = (interval(runs, figure.of, seed) for runs in (static, system))
    gain = paired(system, static, figure.of, seed)
    return SeedRow(
        title=f"{figure.title} ({figure.unit})",
        paper_static=_range(figure.static),
        paper_adaptive=_range(figure.adaptive),
        static=shown(was),
        system=shown(now),
        gain=shown(gain, signed=True),
        static_verdict=None if was is None else verdict(was, figure.static, figure.better),
        system_verdict=None if now is None or gain is None else verdict(now, figure.adaptive, figure.better, gain),
    )


def grid(rows: Sequence[SeedRow], title: str, reasons: bool = True) -> Grid:
    """The rows as a table of text, under each of our figures its verdict, with the reason where there is room."""
    header = (
        "",
        "paper, static",
        "paper, adaptive",
        "ours, static optimum",
        "ours, full system",
        "full system less static optimum",
    )
    return Grid(
        title,
        header,
        tuple(
            (
                row.title,
                row.paper_static,
                row.paper_adaptive,
                f"{row.static}\n{_said(row.static_verdict, reasons)}",
                f"{row.system}\n{_said(row.system_verdict, reasons)}",
                row.gain,
            )
            for row in rows
        ),
    )


def _said(found: Verdict | None, reasons: bool) -> str:
    if found is None:
        return "-"
    return f"{found.word}\n({found.why})" if reasons else found.word


def _range(ends: tuple[float, float]) -> str:
    return f"{min(ends):g} to {max(ends):g}"


def _exposed(runs: Sequence[Run]) -> str:
    arrived = sum(run.metrics.arrived for run in runs)
    exposed = sum((run.metrics.exposed or 0.0) * run.metrics.arrived for run in runs)
    violations = sum(run.metrics.violations for run in runs)
    return f"{violations} violations, {exposed / arrived if arrived else 0.0:.1%} of requests exposed"

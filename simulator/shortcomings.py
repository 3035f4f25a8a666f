"""PURE: what a reader should know before believing a comparison, and where the system does no better or worse: said in
sentences, so that no table has to be searched for it."""

from collections.abc import Iterator, Sequence

from simulator import optimality
from simulator.results import Results, Run
from simulator.statistics import PAIRS_MIN
from simulator.table import HEADLINE, Cell, compare

TUNED_BELOW = 10
"""Seeds 0 to 9 are tuned on (mathematics.md, part D); what is reported is of others."""
SHOWN = 20
"""Of sentences of a kind; the rest is counted."""


def shortcomings(found: Results, seed: int) -> list[str]:
    """Everything that speaks against the system or against the comparison, the gravest first. `seed` draws the
    resamples."""
    said = [*_broken(found.runs), *_unfair(found)]
    for point in sorted({run.point for run in found.runs}):
        runs = [run for run in found.runs if run.point == point]
        said += [*_beaten(found, runs, _at(point), seed), *optimality.sentences(found, runs, _at(point), seed)]
    return said


def _broken(runs: Sequence[Run]) -> list[str]:
    """Invariants that did not hold, and runs that did not end."""
    said = [f"{_name(run)} broke an invariant: {text}" for run in runs for text in run.violations]
    cut = [
        f"{_name(run)} was cut short, and its figures are of what there was" for run in runs if run.finished != "whole"
    ]
    return [*_bounded(said, "violations"), *_bounded(cut, "runs that were cut short")]


def _unfair(found: Results) -> Iterator[str]:
    """What the figures cannot carry."""
    if len(found.seeds) < PAIRS_MIN:
        yield (
            f"{len(found.seeds)} seeds are too few: with fewer than {PAIRS_MIN} no difference is called one, and the "
            "intervals are too narrow"
        )
    if tuned := [seed for seed in found.seeds if seed < TUNED_BELOW]:
        yield f"seeds {', '.join(map(str, tuned))} are among those that parameters are tuned on"
    worlds = {run.world for run in found.of(found.reference)}
    for policy in found.policies:
        runs = found.of(policy)
        if not runs:
            yield f"{policy} has no run"
        elif odd := [run for run in runs if run.world not in worlds]:
            seeds = ", ".join(str(run.seed) for run in odd[:SHOWN])
            yield f"{policy} met worlds that {found.reference} did not (seeds {seeds}): they are in no difference"
    idle = sorted({each.name for run in found.runs for each in run.metrics.classes if not each.arrived})
    if idle:
        yield f"in some runs no request of {', '.join(idle)} arrived"


def _beaten(found: Results, runs: Sequence[Run], where: str, seed: int) -> Iterator[str]:
    """Where the system is worse than others, or no better than the reference."""
    columns = [column for column in HEADLINE if column.better is not None]
    names = [name for name in found.policies if name != found.system and name not in found.bounds]
    rows = dict(compare(runs, names, found.system, columns, seed).rows)
    for number, column in enumerate(columns):
        cells: dict[str, Cell] = {name: rows[name][number] for name in names}
        ahead = [name for name in names if cells[name].word == "better"]
        if ahead:
            yield f"{column.title}{where}: {found.system} is worse than {', '.join(ahead)}"
        if found.reference in cells and found.reference not in ahead and cells[found.reference].word != "worse":
            yield f"{column.title}{where}: no difference between {found.system} and {found.reference} beyond chance"


def _bounded(said: list[str], what: str) -> list[str]:
    more = len(said) - SHOWN
    return said if more <= 0 else [*said[:SHOWN], f"and {more} more {what}, which results.json lists"]


def _name(run: Run) -> str:
    return f"{run.policy}, seed {run.seed}{_at(run.point)}"


def _at(point: tuple[tuple[str, float], ...]) -> str:
    return "".join(f", {key} = {value:g}" for key, value in point)

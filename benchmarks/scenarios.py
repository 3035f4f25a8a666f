"""Policies side by side in simulated worlds: `python -m benchmarks.scenarios [SCENARIO ...]`, by `scenarios.toml`.

Of each comparison two files are kept in `results/scenarios`: what its tables say, and every run's metrics as CSV, from
which anybody may reckon anew.
"""

import argparse
import csv
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks import table
from resplit.commands.simulate import progress, seeds_of
from schemas.base import Value
from simulator import optimality
from simulator.files import read_scenario, shipped, with_value
from simulator.report import headline, seed_grid
from simulator.results import Results, Run
from simulator.runner import Done, count, run_one, simulate
from simulator.scenario import Scenario
from simulator.shelf import Shelf
from simulator.shortcomings import shortcomings
from simulator.statistics import Interval
from simulator.table import BY_KEY, Grid, interval, markdown, paired, run_rows

PARAMETERS = Path(__file__).with_suffix(".toml")
FOLDER = "scenarios"
SEED = 0
"""Of the resamples."""
START = "static-start"
"""The plan that is best for what is known when a run begins: what somebody who never moves has in practice."""

Row = dict[str, Any]


class Comparison(Value):
    """One scenario under some policies."""

    scenario: str
    policies: tuple[str, ...] = Field(min_length=1)
    other: dict[str, Any] = Field(default={}, alias="with")
    """Values other than the scenario's own, by keys written with dots."""

    def varied(self) -> Scenario:
        """Raises `ResplitError` naming the key that the scenario has not."""
        found = read_scenario(shipped()[self.scenario])
        for key, value in self.other.items():
            found = with_value(found, key, value)
        return found


class Parameters(Value):
    """All that is compared."""

    seeds: str
    comparison: tuple[Comparison, ...] = Field(min_length=1)


def main() -> None:
    parameters = Parameters.model_validate(tomllib.loads(PARAMETERS.read_text()))
    compared = {each.varied().name: each for each in parameters.comparison}
    parser = argparse.ArgumentParser(description="Compare policies in simulated worlds, as scenarios.toml says.")
    parser.add_argument(
        "scenario", nargs="*", help=f"those alone: {', '.join(compared)}", default=list(compared), metavar="NAME"
    )
    parser.add_argument("--seeds", default=parameters.seeds, help="worlds to draw; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one for each core")
    asked = parser.parse_args()
    if unknown := set(asked.scenario) - compared.keys():
        parser.error(f"{', '.join(sorted(unknown))}: the comparisons are {', '.join(compared)}")
    for name, each in compared.items():
        if name in asked.scenario:
            compare(each, seeds_of(asked.seeds), asked.jobs)


def compare(comparison: Comparison, seeds: Sequence[int], jobs: int) -> None:
    """Run one comparison and keep what came of it."""
    scenario = comparison.varied()
    shelf = Shelf(table.SHELF, Done, run_one)
    with progress(scenario.name, count(scenario, comparison.policies, seeds)) as done:
        found = simulate(scenario, comparison.policies, seeds, "", jobs, lambda job, run: done(), shelf)
    folder = table.RESULTS / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{scenario.name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(run_rows(found.runs))
    table.write(
        f"{FOLDER}/{scenario.name}",
        scenario.title,
        list(rows(found)),
        seeds=f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else str(seeds[0]),
        policies=found.policies,
        other=comparison.other,
        core_s=round(sum(run.wall_s for run in found.runs), 1),
        events=sum(run.events for run in found.runs),
        requests=sum(run.metrics.arrived for run in found.runs),
        shortcomings=shortcomings(found, SEED),
    )


def rows(found: Results) -> Iterator[Row]:
    """What the tables of each point of a sweep say, or of all there is."""
    for point in sorted({run.point for run in found.runs}):
        runs = [run for run in found.runs if run.point == point]
        served, spent = headline(found, runs)
        yield {
            "point": dict(point),
            "figures": figures(found, runs),
            "served": _grid(served),
            "spent": _grid(spent),
            "paper": _grid(seed_grid(found, runs)),
            "optimality": _grid(optimality.grid(found, runs, SEED)),
        }


def figures(found: Results, runs: Sequence[Run]) -> Row:
    """What the system is held to, with 95 % intervals over the seeds; None where it was not compared."""
    system, static, start = (
        [run for run in runs if run.policy == name] for name in (found.system, found.reference, START)
    )
    qos = BY_KEY["qos_percent"].of
    return {
        "qos_static": _ends(interval(static, qos, SEED)),
        "qos": _ends(interval(system, qos, SEED)),
        "qos_gain": _ends(paired(system, static, qos, SEED)),
        "qos_gain_start": _ends(paired(system, start, qos, SEED)) if start else None,
        "phi_over_clairvoyant": _ends(optimality.over_clairvoyant(runs, found.system, SEED)),
        "phi_over_bound": _ends(optimality.over_bound(runs, found.system, SEED)),
        "goodput_utilisation": _ends(interval(system, BY_KEY["goodput_utilisation_percent"].of, SEED)),
        "down_s_max": max((run.metrics.down_s_max or 0.0 for run in system), default=None),
        "violations": sum(run.metrics.violations for run in runs),
    }


def _ends(found: Interval | None) -> list[float] | None:
    """Mean and ends, as far as they mean anything."""
    return None if found is None else [round(value, 4) for value in (found.mean, found.low, found.high)]


def _grid(made: Grid) -> Row:
    return {"title": made.title, "lines": markdown(made)}


if __name__ == "__main__":
    main()

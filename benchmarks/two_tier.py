"""Core and light services in simulated worlds, policies side by side: `python -m benchmarks.two_tier [SCENARIO ...]`.

Of each scenario two files are kept in `results/two-tier`: what its tables say, and every run as CSV.
"""

import argparse
import csv
import os
from dataclasses import asdict
from pathlib import Path

from benchmarks import table
from resplit.commands.simulate import progress, seeds_of
from simulator.files import read, shipped
from simulator.shelf import Shelf
from simulator.table import Grid
from simulator.tiers.report import grid, run_rows, verdicts
from simulator.tiers.results import KNOWN, TierResults, TierRun, compare, jobs_of, run_one
from simulator.tiers.scenario import TwoTierScenario

FOLDER = Path("two-tier")
NAMES = ("two-tier", "two-tier-bursts")
SEEDS = "10-39"
"""Tuned on 0 to 9."""


def grids(found: TierResults) -> list[Grid]:
    """What is aimed at, and each load."""
    return [verdicts(found), *(grid(found, load) for load in found.loads)]


def kept(name: str, seeds: list[int], jobs: int, said: str) -> None:
    """Run one scenario and keep what came of it."""
    scenario = read(shipped()[name])
    assert isinstance(scenario, TwoTierScenario), f"{name} has one tier"
    shelf = Shelf(table.SHELF, TierRun, run_one)
    with progress(name, len(jobs_of(scenario, list(KNOWN), seeds))) as done:
        found = compare(scenario, list(KNOWN), seeds, "", jobs, lambda run: done(), shelf)
    path = table.RESULTS / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows(run_rows(found))
    table.write(str(FOLDER / name), scenario.title, [], seeds=said, grids=[asdict(each) for each in grids(found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="SCENARIO", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--seeds", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    for name in arguments.names:
        kept(name, seeds_of(arguments.seeds), arguments.jobs, arguments.seeds)


if __name__ == "__main__":
    main()

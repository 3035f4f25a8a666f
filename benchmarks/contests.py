"""Who decides side by side in worlds of two tiers and of many models: `python -m benchmarks.contests [SCENARIO ...]`.

Of each scenario two files are kept, in `results/two-tier` or in `results/residency`: what its tables say, and every run
as CSV; and its plots, in `docs/plots`.
"""

import argparse
import csv
import os
from dataclasses import asdict
from typing import Any

from benchmarks import table
from resplit.commands.simulate import progress, seeds_of
from simulator.contest import Contest
from simulator.contest_report import grids, run_rows
from simulator.files import read, shipped
from simulator.residency.results import CONTEST as RESIDENCY
from simulator.shelf import Shelf
from simulator.tiers.results import CONTEST as TIERS

NAMES = {"two-tier": "two-tier", "two-tier-bursts": "two-tier", "residency": "residency"}
"""Scenarios, and the folder in which what came of each is kept."""
CONTESTS: dict[str, Contest[Any, Any]] = {"two-tier": TIERS, "residency": RESIDENCY}
PLOTS = table.RESULTS.parents[1] / "docs" / "plots"
SEEDS = "10-39"
"""Tuned on 0 to 9."""


def kept(name: str, seeds: list[int], jobs: int, said: str) -> None:
    """Run one scenario and keep what came of it."""
    contest, scenario = CONTESTS[NAMES[name]], read(shipped()[name])
    assert isinstance(scenario, contest.scenario), f"{name} is no scenario of {NAMES[name]}"
    shelf = Shelf(table.SHELF, contest.kind, contest.run)
    names = list(contest.contenders)
    with progress(name, len(contest.jobs(scenario, names, seeds))) as done:
        found = contest.compare(scenario, names, seeds, "", jobs, done, shelf)
    path = table.RESULTS / NAMES[name] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows(run_rows(contest, found))
    tables = [asdict(each) for each in grids(contest, found)]
    PLOTS.mkdir(exist_ok=True)
    plots = []
    for called, caption, png in contest.pictures(found):
        (PLOTS / f"{name}-{called}").write_bytes(png)
        plots.append({"file": f"plots/{name}-{called}", "caption": caption})
    table.write(f"{NAMES[name]}/{name}", scenario.title, [], seeds=said, grids=tables, plots=plots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="SCENARIO", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--seeds", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - NAMES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    for name in arguments.names:
        kept(name, seeds_of(arguments.seeds), arguments.jobs, arguments.seeds)


if __name__ == "__main__":
    main()

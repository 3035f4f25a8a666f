"""How far from the best what lies on disks and in memories is: `python -m benchmarks.disks`.

Servers and models are drawn as in the scenario `residency`, with the popularity of its beginning, and nothing lies
anywhere yet. Each way to decide is held against the best that the integer program found, and against the linear
program, below which nothing costs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import cast

from benchmarks.table import Row, report
from orchestrator.residency import genetic, greedy, program
from orchestrator.residency.problem import Lying, Setting
from orchestrator.residency.reckoning import reckon
from simulator.files import read, shipped
from simulator.residency.drawn import drawn, rates
from simulator.residency.scenario import ResidencyScenario

SIZES = ((4, 6), (8, 12), (20, 30))
"""Servers and models."""
LIMIT_S = 60.0


def setting_of(servers: int, models: int, seed: int) -> Setting:
    scenario = cast(ResidencyScenario, read(shipped()["residency"]))
    scenario = scenario.model_copy(update={"servers": servers, "models": models, "families": max(2, models // 2)})
    found = drawn(scenario, seed)
    return found.setting(rates(scenario, found, seed)[0][1])


def measure(servers: int, models: int, seeds: range) -> list[Row]:
    """What each way costs over the bound, and over the program's best where that was proven."""
    ways: dict[str, Callable[[Setting, int], Lying]] = {
        "marginal gain, no swaps": lambda setting, _: greedy.place(setting, 0),
        "marginal gain and swaps (production)": lambda setting, _: greedy.place(setting),
        "bred": genetic.place,
    }
    over_bound: dict[str, list[float]] = {name: [] for name in (*ways, "integer program")}
    over_best: dict[str, list[float]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in over_bound}
    proven = 0
    for seed in seeds:
        setting = setting_of(servers, models, seed)
        began = time.process_time()
        best = program.place(setting, LIMIT_S)
        seconds["integer program"].append(time.process_time() - began)
        least = max(best.bound, program.bound(setting))
        over_bound["integer program"].append(best.cost / least - 1.0)
        is_proven = best.gap < 1e-3
        proven += is_proven
        for name, way in ways.items():
            began = time.process_time()
            lying = way(setting, seed)
            seconds[name].append(time.process_time() - began)
            cost = reckon(setting, lying).cost
            over_bound[name].append(cost / least - 1.0)
            if is_proven:
                over_best[name].append(cost / best.cost - 1.0)
        print(servers, models, seed, {name: round(each[-1], 3) for name, each in over_bound.items()}, flush=True)
    return [
        {
            "name": name,
            "size": f"{servers} x {models}",
            "seeds": len(seeds),
            "proven": proven if name == "integer program" else None,
            "over the bound": round(statistics.mean(over_bound[name]), 4),
            "worst": round(max(over_bound[name]), 4),
            "over the best": round(statistics.mean(over_best[name]), 4) if over_best.get(name) else None,
            "worst over the best": round(max(over_best[name]), 4) if over_best.get(name) else None,
            "cpu s": round(statistics.median(seconds[name]), 2),
        }
        for name in over_bound
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows = [row for servers, models in SIZES for row in measure(servers, models, range(10, 10 + arguments.seeds))]
    title = f"What lies where, against an integer program of {LIMIT_S:g} s and a bound"
    report("disks", title, rows, load_average=os.getloadavg())


if __name__ == "__main__":
    main()

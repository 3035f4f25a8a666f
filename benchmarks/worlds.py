"""What a simulated world costs: `python -m benchmarks.worlds [NAME ...]`.

On one core, deciding included: an hour of forty nodes, the smart city as it is shipped, and five thousand nodes that
answer a hundred thousand requests. Each world is a process of its own, so that its memory is its own too.
"""

import argparse
import os
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.table import Row, report
from simulator.files import read_scenario, shipped, with_value
from simulator.policies import CONTENDERS
from simulator.scenario import Churn, RequestClass, Scenario, SiteSpec, Workload
from simulator.world import World

SEED = 10
HOUR_S = 3600.0
HOUR_TARGET_S = 30.0


def city() -> Scenario:
    """The smart city as it is shipped."""
    return read_scenario(shipped()["smart-city"])


def hour() -> Scenario:
    """Its forty nodes over an hour in which one becomes slow now and then, with a request a second."""
    calm = city().model_copy(update={"faults": (), "churn": Churn(slow_every_s=1800.0, slow_s=60.0)})
    workload = calm.workload.model_copy(update={"rate_per_s": 1.0, "ramps": ()})
    sites = tuple(site for site in calm.sites if site.name != "cloud")
    return calm.model_copy(update={"duration_s": HOUR_S, "drain_s": 30.0, "workload": workload, "sites": sites})


def country() -> Scenario:
    """Five thousand nodes at a hundred sites, and 100,000 short requests within 40 minutes."""
    sites = tuple(SiteSpec(name=f"place-{number}", nodes=50, node="mec") for number in range(100))
    short = RequestClass(name="short", share=1.0, prompt_tokens=128, output_tokens=4, spread=0.3)
    workload = Workload(rate_per_s=100_000 / 2400, classes=(short,))
    return with_value(city(), "churn", {"slow_every_s": 36_000.0, "slow_s": 60.0}).model_copy(
        update={"faults": (), "sites": sites, "workload": workload, "duration_s": 2430.0, "drain_s": 30.0}
    )


WORLDS: Mapping[str, tuple[Callable[[], Scenario], float | None]] = {
    "an hour of 40 nodes": (hour, HOUR_TARGET_S),
    "smart-city": (city, None),
    "5,000 nodes, 100,000 requests": (country, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what simulated worlds cost.")
    parser.add_argument("name", nargs="*", choices=[*WORLDS, []], default=list(WORLDS), help="those alone")
    rows = []
    for name in parser.parse_args().name:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            rows.append(alone.submit(measured, name).result())
    report("worlds", "Simulated worlds, one core each", rows, load_average=os.getloadavg(), seed=SEED)


def measured(name: str) -> Row:
    """One world from its beginning to its end."""
    make, target_s = WORLDS[name]
    scenario = make()
    result = World(scenario, CONTENDERS["full"], SEED).run()
    done = sum(outcome.last_s is not None and outcome.error is None for outcome in result.outcomes)
    row: Row = {
        "name": name,
        "nodes": sum(site.nodes for site in scenario.sites),
        "simulated_s": scenario.duration_s,
        "requests": len(result.outcomes),
        "completed": done,
        "plans": len(result.epochs),
        "events": result.events,
        "wall_s": round(result.wall_s, 1),
        "deciding_s": round(result.planner_s, 1),
        "us_per_event": round(1e6 * (result.wall_s - result.planner_s) / result.events, 1),
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "violations": len(result.violations),
    }
    return row if target_s is None else {**row, "target_s": target_s}


if __name__ == "__main__":
    main()

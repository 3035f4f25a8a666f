"""Thousands of small worlds in which everything goes wrong: `python -m simulator.swarm --worlds 200 --seed 0`.

Each seed draws a cluster, a load and a schedule of faults, with a bus that drops, repeats and reorders. Safety is
checked at every step: no wrong token, no sensitive block where it is not trusted, no plan in force before its nodes are
ready, no memory beyond what there is. Liveness is checked once the faults are over: whatever was accepted ends, and
fresh requests are served, within the calm. A world that fails is tried with fewer and fewer faults, and the shortest
story is told.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from simulator.calm import Calm
from simulator.policies import CONTENDERS
from simulator.scenario import Fault, Scenario
from simulator.schedules import drawn
from simulator.world import World

STORY_MAX = 40
CONTENDER = "full"


@dataclass(frozen=True)
class Finding:
    """What was wrong with one world."""

    seed: int
    safety: tuple[str, ...]
    liveness: tuple[str, ...]
    faults: tuple[Fault, ...]
    events: int
    requests: int
    story: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.safety and not self.liveness


def tried(scenario: Scenario, seed: int, story: bool = False) -> Finding:
    """One world, and what was wrong with it."""
    world = World(scenario, CONTENDERS[CONTENDER], seed)
    calm = Calm(world, scenario.duration_s)
    safety: list[str] = []
    liveness: list[str] = []
    try:
        result = world.run()
        safety += result.violations
        liveness += calm.shortcomings()
    except Exception as error:  # a defect of whatever kind is what this looks for
        safety.append(f"{world.kernel.now:.3f} s: {type(error).__name__}: {error}")
        if story:
            raise
    told = tuple(
        f"{one.at_s:9.3f} s  {one.kind.value}  {_said(one.fields)}" for one in world.trail.told[-STORY_MAX:]
    ) if story else ()  # fmt: skip
    return Finding(seed, tuple(safety), tuple(liveness), scenario.faults, world.kernel.events, len(world.clients), told)


def found(seed: int) -> Finding:
    return tried(drawn(seed), seed)


def smallest(seed: int) -> Finding:
    """The same failure with as few faults as it takes, and its story."""
    scenario = drawn(seed)
    first = tried(scenario, seed)
    faults = list(scenario.faults)
    for fault in scenario.faults:
        fewer = [one for one in faults if one is not fault]
        again = tried(scenario.model_copy(update={"faults": tuple(fewer)}), seed)
        if again.safety if first.safety else again.liveness:
            faults = fewer
    kept = scenario.model_copy(update={"faults": tuple(faults)})
    try:
        return tried(kept, seed, story=True)
    except Exception:
        return tried(kept, seed)


def _said(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)[:200]


def swarm(seeds: Sequence[int], jobs: int, on_done: Callable[[Finding], None]) -> list[Finding]:
    """All of them; those that fail."""
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for one in pool.map(found, seeds, chunksize=4):
            on_done(one)
            if not one.holds:
                failed.append(one)
    return failed


def write(ledger: Path, entry: dict[str, Any]) -> None:
    """Add a run to the ledger, which need not exist yet."""
    runs = json.loads(ledger.read_text())["runs"] if ledger.exists() else []
    ledger.write_text(json.dumps({"benchmark": "swarm", "runs": [*runs, entry]}, indent=2) + "\n")


def tell(finding: Finding, say: Callable[[str], None]) -> None:
    say(f"seed {finding.seed}: python -m simulator.swarm --replay {finding.seed}")
    for sentence in (*finding.safety, *finding.liveness)[:10]:
        say(f"  {sentence}")
    for fault in finding.faults:
        say(f"  fault: {fault.model_dump(exclude_defaults=True)}")
    for line in finding.story:
        say(f"  {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first world")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=int, help="only this seed, with as few faults as it takes, and its story")
    parser.add_argument("--ledger", type=Path, help="a JSON file of runs to which this one is added")
    parser.add_argument("--commit", default="unknown", help="what the ledger says was run")
    given = parser.parse_args()
    if given.replay is not None:
        finding = smallest(given.replay)
        tell(finding, print)
        sys.exit(not finding.holds)
    events = requests = 0
    faults: Counter[str] = Counter()

    def count(one: Finding) -> None:
        nonlocal events, requests
        events += one.events
        requests += one.requests
        faults.update(fault.kind for fault in one.faults)
        if not one.holds:
            tell(one, print)

    failed = swarm(range(given.seed, given.seed + given.worlds), given.jobs, count)
    print(f"{given.worlds} worlds, {requests} requests, {events} events: {len(failed)} failed")
    if given.ledger is not None:
        entry: dict[str, Any] = {
            "seeds": [given.seed, given.seed + given.worlds - 1],
            "worlds": given.worlds,
            "faults": dict(sorted(faults.items())),
            "requests": requests,
            "events": events,
            "failed": sorted(one.seed for one in failed),
            "commit": given.commit,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write(given.ledger, entry)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

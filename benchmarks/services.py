"""Services of two tiers: how fast they are placed, and how well delays are predicted.

    python -m benchmarks.services [--quick]

Random settings after the paper's Table I. The core program is solved to proof, or for a minute; the controller's slots
follow one another, each with other rates and from what the one before decided; delays are those of queues that are run.
"""

import argparse
import os
import time
from dataclasses import replace

import numpy as np

from benchmarks.slotted import SERVERS, arrived, delays
from benchmarks.table import Row, report
from orchestrator.services.core import Placed, Rules, place_core
from orchestrator.services.light import Steering, steer
from orchestrator.services.problem import SOURCE, Setting
from orchestrator.services.routing import Speeds
from profiler.effective_capacity import GammaService, PoissonJobs, paper_tail, tail
from simulator.files import read, shipped
from simulator.tiers.drawn import drawn
from simulator.tiers.scenario import ServiceSpec, TaskSpec, TwoTierScenario

PROGRAM_TARGET_S = 60.0
SLOT_TARGET_MS = 20.0
SHARE = 0.01
"""Of the jobs, that wait longer than the delay that is predicted."""
TASKS, STEPS = 8, 8
"""Kinds of tasks, and services of each."""
USERS_FEW, USERS_MANY = 5, 35


def setting_of(nodes: int, services: int, core: int, users: int, seed: int) -> tuple[Setting, Speeds]:
    """A world of Table I with so many nodes, three in ten of which are servers, and of so many services the first
    `core` heavy; users are at the first of the devices."""
    rng = np.random.default_rng(seed)
    names = [f"s{number}" for number in range(services)]
    tasks = []
    for number in range(TASKS):
        first, left, right, join, *rest = (str(name) for name in rng.choice(names, STEPS, replace=False))
        after = {first: (SOURCE,), left: (first,), right: (first,), join: (left, right)}
        after |= {each: (before,) for before, each in zip([join, *rest], rest, strict=False)}
        tasks.append(TaskSpec(name=f"t{number}", after=after))
    specs = [ServiceSpec(name=name, core=number < core) for number, name in enumerate(names)]
    table = read(shipped()["two-tier"])
    assert isinstance(table, TwoTierScenario)
    servers = round(0.3 * nodes)
    more = {"devices": nodes - servers, "servers": servers, "services": tuple(specs), "tasks": tuple(tasks)}
    found = drawn(table.model_copy(update=more), seed)
    at = {user.at for user in found.users[:users]}
    streams = tuple(one for one in found.setting.streams if one.at in at)
    return replace(found.setting, streams=streams), found.speeds


def rules_of(setting: Setting, speeds: Speeds) -> Rules:
    capacity = {name: 0.7 * speeds.one[name].mean / kind.work for name, kind in setting.services.items()}
    return Rules(capacity, dict.fromkeys(setting.services, 2), latency_cost=0.1)


def programs(seeds: int) -> list[Row]:
    """Thirty core services on fifty nodes, any of which may fail."""
    rows = []
    for users in (USERS_FEW, USERS_MANY):
        seconds, gaps, instances = [], [], []
        for seed in range(seeds):
            setting, speeds = setting_of(50, 30, 30, users, seed)
            began = time.perf_counter()
            found = place_core(setting, rules_of(setting, speeds), PROGRAM_TARGET_S)
            seconds.append(time.perf_counter() - began)
            gaps.append(found.cost / found.bound - 1.0)
            instances.append(sum(found.placed.values()))
        proven = sum(gap <= 1e-6 for gap in gaps)
        rows.append(
            {
                "name": f"core program, 50 nodes x 30 services, {users} users, some {np.mean(instances):.0f} instances",
                **_spread(seconds, 1),
                "unit": "s",
                "runs": f"{proven} of {seeds} proven, gap {max(gaps):.2%} at most",
                "target": PROGRAM_TARGET_S,
            }
        )
    return rows


def slots(seeds: int, count: int) -> list[Row]:
    """Eighteen light services beside twelve core ones on a hundred nodes."""
    taken: list[float] = []
    for seed in range(seeds):
        setting, speeds = setting_of(100, 30, 12, USERS_FEW, seed)
        core = place_core(setting, replace(rules_of(setting, speeds), survives_node=False), 10.0).placed
        steering = Steering(dict.fromkeys(setting.tasks, 0.02), cost_weight=0.05)
        found = steer(setting, speeds, replace(steering, tried=4000), {}, core, {})
        rng = np.random.default_rng(seed)
        for turn in range(count):
            streams = tuple(replace(one, per_slot=one.per_slot * rng.uniform(0.7, 1.4)) for one in setting.streams)
            debts = {task: float(rng.uniform(0, 5)) for task in setting.tasks}
            light: Placed = {place: each for place, each in found.placed.items() if place not in core}
            began = time.perf_counter()
            found = steer(replace(setting, streams=streams), speeds, steering, debts, core, light, found.known, turn)
            taken.append(1e3 * (time.perf_counter() - began))
    name = f"controller slot, 100 nodes x 30 services, {TASKS * USERS_FEW} streams"
    return [{"name": name, **_spread(taken, 1), "unit": "ms", "runs": f"{len(taken)} slots", "target": SLOT_TARGET_MS}]


def _spread(values: list[float], digits: int) -> Row:
    median, p95 = (round(float(np.quantile(values, share)), digits) for share in (0.5, 0.95))
    return {"median": median, "p95": p95, "worst": round(max(values), digits)}


def tails(slot_count: int) -> list[Row]:
    """The delay that one job in a hundred exceeds, and how many are predicted to."""
    rows = []
    for shape, scale, size, load in SERVERS:
        service = GammaService(shape, scale)
        jobs = PoissonJobs(load * service.mean / size, size)
        rng = np.random.default_rng(3)
        seen = delays(arrived(rng, jobs, slot_count), rng.gamma(shape, scale, slot_count))
        limit = float(np.quantile(seen, 1.0 - SHARE))
        share = float((seen > limit).mean())
        ours, paper = tail(jobs, service), paper_tail(jobs, service)
        assert ours is not None and paper is not None
        rows.append(
            {
                "name": f"Gamma({shape:g}, {scale:g}), jobs of {size:g}, {load:.0%} busy",
                "delay_slots": limit,
                "longer": round(share, 5),
                "corrected": round(ours.over(limit) / share, 3),
                "paper": float(f"{paper.over(limit) / share:.2g}"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and a tenth of the slots")
    arguments = parser.parse_args()
    quick = arguments.quick
    speed = [*slots(1 if quick else 5, 20), *programs(1 if quick else 5)]
    predicted = tails(40_000 if quick else 400_000)
    report("services", "services of two tiers", speed, predicted=predicted, load_average=os.getloadavg())


if __name__ == "__main__":
    main()

"""Thousands of small worlds in which everything goes wrong: `python -m simulator.swarm --worlds 200 --seed 0`.

Each seed draws a cluster, a load and a schedule of faults, with a bus that drops, repeats and reorders. Safety is
checked at every step: no wrong token, no sensitive block where it is not trusted, no plan in force before its nodes are
ready, no memory beyond what there is. Liveness is checked once the faults are over: whatever was accepted has ended,
and the model serves again. A world that fails is tried with fewer and fewer faults, and the shortest story is told.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from schemas.deployment import Settings
from schemas.slo import Slo
from simulator.draws import Draws
from simulator.policies import CONTENDERS
from simulator.scenario import (
    BusSpec,
    Churn,
    Fault,
    LinkSpec,
    ModelSpec,
    NetworkSpec,
    NodeSpec,
    RequestClass,
    Scenario,
    Served,
    SiteSpec,
    Telemetry,
    Where,
    Workload,
)
from simulator.world import World

CALM_S = 75.0
"""Without faults at the end: a request waits a minute for a plan before it is given up."""
STORY_MAX = 40
CONTENDER = "full"
TAIL_S = 12.0
"""Requests that arrive in the last seconds before the end of arrivals are to succeed: it all works again."""


@dataclass(frozen=True)
class Finding:
    """What was wrong with one world."""

    seed: int
    safety: tuple[str, ...]
    liveness: tuple[str, ...]
    faults: tuple[Fault, ...]
    events: int
    story: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.safety and not self.liveness


def drawn(seed: int) -> Scenario:
    """The world of a seed."""
    rng = Draws(seed).stream("swarm")
    layers = int(rng.integers(4, 12))
    sites = int(rng.integers(1, 4))
    per_site = int(rng.integers(2, 4)) if sites > 1 else int(rng.integers(3, 6))
    room = float(rng.uniform(1.6, 4.0)) / max(2, sites * per_site - 1)
    layer_bytes = 40_000_000
    memory = int(room * layers * layer_bytes * 1.3) + 200_000_000
    trusted = rng.random() < 0.7
    duration = 60.0 + CALM_S
    fast = NodeSpec(flops_per_s=2e12, bytes_per_s=6e10, memory_bytes=memory)
    slow = NodeSpec(flops_per_s=1e12, bytes_per_s=3e10, memory_bytes=memory)
    return Scenario(
        name="swarm",
        title=f"swarm, seed {seed}",
        duration_s=duration,
        warmup_s=15.0,
        drain_s=CALM_S,
        timeout_s=60.0,
        model=ModelSpec(
            name="toy", layers=layers, hidden=1024, layer_bytes=layer_bytes, ends_bytes=layer_bytes,
            layer_flops=80_000_000, head_flops=80_000_000, layer_kv_bytes=2048, context_tokens=2048,
        ),
        served=Served(
            settings=Settings(
                context_tokens=512,
                max_sequences=int(rng.integers(4, 24)),
                max_queued=64,
                pipeline_depth=int(rng.integers(1, 4)),
                chunk_tokens=64,
                recovery="fast" if rng.random() < 0.2 else "identical",
            ),
            sensitive=None if trusted else "ends",
            stages=int(rng.integers(2, 4)) if rng.random() < 0.3 else None,
            slo=Slo(ttft_ms=2000.0) if rng.random() < 0.3 else None,
        ),
        kinds={"fast": fast, "slow": slow},
        sites=tuple(
            SiteSpec(
                name=f"s{i}", nodes=per_site, node="fast" if rng.random() < 0.6 else "slow",
                trusted=None if trusted or i == 0 else bool(rng.random() < 0.5),
            )
            for i in range(sites)
        ),
        network=NetworkSpec(
            within=LinkSpec(rtt_ms=0.5, mbit_per_s=1000, jitter=0.1),
            between=LinkSpec(rtt_ms=float(rng.uniform(2, 30)), mbit_per_s=float(rng.uniform(50, 1000)), jitter=0.2),
            cloud=LinkSpec(rtt_ms=40, mbit_per_s=100),
        ),
        workload=Workload(
            rate_per_s=float(rng.uniform(0.3, 1.5)),
            classes=(
                RequestClass(name="chat", share=3, prompt_tokens=60, output_tokens=40, spread=0.6),
                RequestClass(name="short", share=1, prompt_tokens=100, output_tokens=2),
            ),
        ),
        faults=tuple(_faults(rng, duration - CALM_S)),
        churn=Churn(),
        telemetry=Telemetry(noise=float(rng.choice([0.0, 0.05, 0.2])), delay_s=float(rng.choice([0.01, 0.2, 1.0]))),
        bus=BusSpec(
            delay_ms=float(rng.choice([1.0, 5.0, 50.0])),
            drop=float(rng.choice([0.0, 0.0, 0.05, 0.2])),
            duplicate=float(rng.choice([0.0, 0.1])),
            reorder=float(rng.choice([0.0, 0.1])),
            clock_skew_s=float(rng.choice([0.0, 3600.0])),
        ),
    )  # fmt: skip


def _faults(rng: np.random.Generator, until_s: float) -> Iterator[Fault]:
    for _ in range(int(rng.integers(1, 6))):
        kind = str(rng.choice(["kill", "kill", "hang", "slow", "cut", "links", "lie", "leader", "throttle"]))
        at_s = float(rng.uniform(16.0, until_s - 8.0))
        lasts_s = float(min(rng.exponential(8.0) + 0.2, until_s - at_s))
        victim = Where(in_plan=int(rng.integers(0, 3)))
        if kind in ("links", "lie") or rng.random() < 0.2:
            victim = Where(share=float(rng.uniform(0.05, 0.5)))
        factor = float(rng.uniform(2.0, 8.0))
        if kind == "leader":
            yield Fault(kind="leader", at_s=at_s)
        else:
            yield Fault(kind=kind, at_s=at_s, lasts_s=lasts_s, factor=factor, where=victim)


def tried(scenario: Scenario, seed: int, story: bool = False) -> Finding:
    """One world, and what was wrong with it."""
    world = World(scenario, CONTENDERS[CONTENDER], seed)
    safety: list[str] = []
    liveness: list[str] = []
    events = 0
    try:
        result = world.run()
        events = result.events
        safety += result.violations
        calm = scenario.duration_s - TAIL_S
        for client in world.clients:
            outcome = client.outcome
            if client.accepted and not client.over:
                liveness.append(f"{client.request_id}, accepted, never ended ({outcome.tokens} tokens)")
            elif outcome.arrival.at_s >= calm and outcome.last_s is None:
                liveness.append(f"{client.request_id}, asked when all was calm, ended in {outcome.error}")
    except Exception as error:  # a defect of whatever kind is what this looks for
        safety.append(f"{world.kernel.now:.3f} s: {type(error).__name__}: {error}")
        if story:
            raise
    told = tuple(
        f"{one.at_s:9.3f} s  {one.kind.value}  {_said(one.fields)}" for one in world.trail.told[-STORY_MAX:]
    ) if story else ()  # fmt: skip
    return Finding(seed, tuple(safety), tuple(liveness), scenario.faults, events, told)


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
    given = parser.parse_args()
    if given.replay is not None:
        finding = smallest(given.replay)
        tell(finding, print)
        sys.exit(not finding.holds)
    events = 0

    def count(one: Finding) -> None:
        nonlocal events
        events += one.events
        if not one.holds:
            tell(one, print)

    failed = swarm(range(given.seed, given.seed + given.worlds), given.jobs, count)
    print(f"{given.worlds} worlds, {events} events: {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

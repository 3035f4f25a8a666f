"""Small worlds drawn from a seed, in which everything goes wrong: short and dense, so that thousands can be run.

Machines are slow and requests short: what is rare in a long run, a fault in the middle of whatever was under way, is
most of what happens here. One world in thirty is as long and as large as nine of the others.
"""

from collections.abc import Iterator

import numpy as np

from schemas.deployment import Settings
from schemas.slo import Slo
from simulator.draws import Draws
from simulator.scenario import (
    BusSpec,
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

FIRST_S = 5.0
"""Requests begin to arrive, and soon after them faults."""
CALM_S = 75.0
"""Without faults at the end, at most: a request waits a minute for a plan before it is given up."""
LAYER_BYTES = 40_000_000
LONG_SHARE = 0.03
ON_DEMAND_SHARE = 0.3
"""Of the worlds, those whose deployment goes cold where faults leave no room for it."""
KINDS = {
    "kill": 4, "hang": 2, "slow": 2, "throttle": 1, "cut": 3, "links": 1, "lie": 1, "leader": 2, "site": 1, "storm": 1,
    "drain": 1, "distrust": 1, "lock": 1, "redeploy": 1,
}  # fmt: skip
"""How often each comes, relative to the others. `site` kills or cuts a whole one; `storm` kills one node thrice, each
time as soon as it is back."""


def drawn(seed: int) -> Scenario:
    """The world of a seed."""
    rng = Draws(seed).stream("swarm")
    is_long = rng.random() < LONG_SHARE
    layers = int(rng.integers(6, 12) if is_long else rng.integers(3, 6))
    sites = int(rng.integers(1, 4))
    per_site = {1: int(rng.integers(3, 6)), 2: int(rng.integers(2, 4)), 3: 2}[sites]
    room = float(rng.uniform(1.6, 4.0)) / max(2, sites * per_site - 1)
    memory = int(room * layers * LAYER_BYTES * 1.3) + 120_000_000
    trusted = rng.random() < 0.7
    lasts_s = float(rng.uniform(45.0, 80.0) if is_long else rng.uniform(8.0, 18.0))
    fast = NodeSpec(flops_per_s=6e11, bytes_per_s=1e10, memory_bytes=memory)
    slow = NodeSpec(flops_per_s=3e11, bytes_per_s=5e9, memory_bytes=memory)
    return Scenario(
        name="swarm",
        title=f"swarm, seed {seed}",
        duration_s=FIRST_S + lasts_s,
        warmup_s=FIRST_S,
        drain_s=CALM_S,
        timeout_s=60.0,
        model=ModelSpec(
            name="toy", layers=layers, hidden=1024, layer_bytes=LAYER_BYTES, ends_bytes=LAYER_BYTES,
            layer_flops=80_000_000, head_flops=80_000_000, layer_kv_bytes=2048, context_tokens=2048,
        ),
        served=Served(
            settings=Settings(
                context_tokens=256,
                max_sequences=int(rng.integers(2, 12)),
                max_queued=64,
                pipeline_depth=int(rng.integers(1, 4)),
                chunk_tokens=32,
                recovery="fast" if rng.random() < 0.2 else "identical",
            ),
            sensitive=None if trusted else "ends",
            stages=int(rng.integers(2, 4)) if rng.random() < 0.3 else None,
            slo=Slo(ttft_ms=2000.0) if rng.random() < 0.3 else None,
            on_demand=Draws(seed).stream("on demand").random() < ON_DEMAND_SHARE,
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
            rate_per_s=float(rng.uniform(0.4, 1.6)),
            classes=(
                RequestClass(name="chat", share=3, prompt_tokens=50, output_tokens=16, spread=0.6),
                RequestClass(name="short", share=1, prompt_tokens=70, output_tokens=2),
            ),
        ),
        faults=tuple(_faults(rng, FIRST_S + lasts_s, sites, most=8 if is_long else 5)),
        telemetry=Telemetry(noise=float(rng.choice([0.0, 0.05, 0.2])), delay_s=float(rng.choice([0.01, 0.2, 1.0]))),
        bus=BusSpec(
            delay_ms=float(rng.choice([1.0, 5.0, 50.0])),
            drop=float(rng.choice([0.0, 0.0, 0.05, 0.2])),
            duplicate=float(rng.choice([0.0, 0.1])),
            reorder=float(rng.choice([0.0, 0.1])),
            clock_skew_s=float(rng.choice([0.0, 3600.0])),
        ),
    )  # fmt: skip


def _faults(rng: np.random.Generator, until_s: float, sites: int, most: int) -> Iterator[Fault]:
    weights = np.array(list(KINDS.values())) / sum(KINDS.values())
    for _ in range(int(rng.integers(1, most + 1))):
        kind = str(rng.choice(list(KINDS), p=weights))
        at_s = float(rng.uniform(FIRST_S + 0.5, until_s - 2.0))
        lasts_s = float(min(rng.exponential(5.0) + 0.2, until_s - at_s))
        victim = Where(in_plan=int(rng.integers(0, 3)))
        if kind in ("links", "lie") or (kind != "storm" and rng.random() < 0.2):
            victim = Where(share=float(rng.uniform(0.05, 0.5)))
        factor = float(rng.uniform(2.0, 8.0))
        match kind:
            case "leader" | "lock" | "redeploy":
                yield Fault(kind=kind, at_s=at_s, lasts_s=None if kind == "leader" else lasts_s)
            case "site":
                share = float(rng.uniform(0.1, 1.0)) / sites
                what = "kill" if rng.random() < 0.5 else "cut"
                yield Fault(kind=what, at_s=at_s, lasts_s=lasts_s, where=Where(share=share, by_site=True))
            case "storm":
                for again in range(3):
                    at_s = min(at_s + float(rng.uniform(1.6, 2.6)) * bool(again), until_s - 0.1)
                    yield Fault(kind="kill", at_s=at_s, lasts_s=0.05, where=victim)
            case _:
                yield Fault(kind=kind, at_s=at_s, lasts_s=lasts_s, factor=factor, where=victim)

"""Train the learned policy: `python -m simulator.learning --seed 0 --generations 16 --jobs 2`.

An evolution strategy (Salimans et al., arXiv 1703.03864): neighbours of the numbers in pairs, one either way, all in
the same few worlds; their rewards count by rank alone; a step along what the better ones have in common. It begins
with numbers that imitate the smoothed threshold. The worlds are short and their seeds are its own (1000 to 1999), so
that nothing is learned of the seeds that are reported. The same seed gives the same file, in however many processes.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.deployment import Settings
from schemas.slo import Slo
from simulator.draws import Draws
from simulator.learned import (
    COUNT,
    FEATURES,
    HIDDEN,
    SHIPPED,
    Generation,
    Learned,
    Parameters,
    Training,
    imitation,
)
from simulator.metrics import completed, measure
from simulator.policies import Contender
from simulator.scenario import (
    Churn,
    LinkSpec,
    ModelSpec,
    NetworkSpec,
    NodeSpec,
    RequestClass,
    Scenario,
    Served,
    SiteSpec,
    Workload,
)
from simulator.world import World

SEEDS = (1000, 1999)
RECONFIGURATION = 0.005
"""What a change of placement takes from the reward: as much as one request in 200 that misses its SLO."""
FAILURE = 0.005
"""What a request that does not complete takes, besides missing its SLO."""
SIGMA = 0.1
"""How far neighbours are, in every number."""
STEP = 0.1
"""Along the estimated gradient, by ranks."""
DECIMALS = 4

Floats = NDArray[np.float64]
Measures = Callable[[Sequence[tuple[tuple[float, ...], int]]], list[float]]


@dataclass(frozen=True)
class Effort:
    """How much is tried."""

    generations: int = 16
    pairs: int = 4
    """Of neighbours in a generation."""
    worlds: int = 2
    """In which each of them is tried, the same for all."""


def training_world(seed: int) -> Scenario:
    """A short world in which nodes slow down, and now and then one dies: 90 s on 4 to 6 machines of two kinds."""
    rng = Draws(seed).stream("training world")
    nodes = int(rng.integers(2, 4))
    memory = int(rng.uniform(0.45, 0.9) * 400_000_000)
    slo = Slo(ttft_ms=1000.0, tpot_ms=float(rng.uniform(18.0, 40.0)))
    return Scenario(
        name="training",
        title=f"training, seed {seed}",
        duration_s=90.0,
        warmup_s=10.0,
        drain_s=10.0,
        timeout_s=20.0,
        model=ModelSpec(
            name="toy",
            layers=6,
            hidden=2048,
            layer_bytes=60_000_000,
            ends_bytes=20_000_000,
            layer_flops=120_000_000,
            head_flops=100_000_000,
            layer_kv_bytes=2048,
            context_tokens=512,
        ),
        served=Served(settings=Settings(context_tokens=256, max_sequences=8, max_queued=64)),
        kinds={
            "fast": NodeSpec(flops_per_s=2e12, bytes_per_s=4e10, memory_bytes=memory),
            "slow": NodeSpec(flops_per_s=1e12, bytes_per_s=2e10, memory_bytes=memory),
        },
        sites=(
            SiteSpec(name="a", nodes=nodes, node="fast"),
            SiteSpec(name="b", nodes=int(rng.integers(2, 4)), node="slow"),
        ),
        network=NetworkSpec(
            within=LinkSpec(rtt_ms=0.4, mbit_per_s=1000.0),
            between=LinkSpec(rtt_ms=4.0, mbit_per_s=200.0),
            cloud=LinkSpec(rtt_ms=30.0, mbit_per_s=100.0),
        ),
        workload=Workload(
            rate_per_s=float(rng.uniform(0.4, 1.2)),
            classes=(RequestClass(name="chat", share=1.0, prompt_tokens=64, output_tokens=16, spread=0.3, slo=slo),),
        ),
        churn=Churn(
            mtbf_s=600.0,
            mttr_s=20.0,
            slow_every_s=float(rng.uniform(20.0, 90.0)),
            slow_s=float(rng.uniform(8.0, 50.0)),
            slow_factors=(3.0, 6.0),
            after_s=12.0,
        ),
    )


def reward(values: tuple[float, ...], seed: int) -> float:
    """Of one policy in one world: its QoS compliance, less a little for each change and each failure."""
    scenario = training_world(seed)
    result = World(scenario, Contender("learned", "in training", lambda: Learned(values)), seed).run()
    found = measure(result, scenario.workload.classes)
    hours = (result.end_s - result.begin_s) / 3600
    failures = sum(not completed(outcome, result.timeout_s) for outcome in result.outcomes)
    return (found.qos or 0.0) - RECONFIGURATION * found.reconfigurations_per_hour * hours - FAILURE * failures


def trained(seed: int, effort: Effort, measures: Measures) -> Iterator[tuple[tuple[float, ...], Generation]]:
    """After each generation the numbers that the training would end with, and how it went; `measures` gives rewards of
    (numbers, seed of a world)."""
    draws = Draws(seed)
    start = draws.stream("inner numbers").normal(0.0, 1 / np.sqrt(len(FEATURES)), HIDDEN * len(FEATURES))
    values = np.asarray(imitation(start.tolist()))
    rng, path = draws.stream("neighbours"), []
    for _ in range(effort.generations):
        seeds = rng.integers(SEEDS[0], SEEDS[1] + 1, effort.worlds).tolist()
        noise = rng.standard_normal((effort.pairs, COUNT))
        ways = np.concatenate([noise, -noise])
        todo = [(_rounded(values + SIGMA * way), world) for way in ways for world in seeds]
        rewards = np.asarray(measures(todo)).reshape(-1, effort.worlds).mean(axis=1)
        values = values + STEP * shaped(rewards) @ ways / np.sqrt(len(ways))
        path.append(values)
        # What single worlds pushed it about with is less in the mean of the second half than in the last.
        mean = np.mean(path[len(path) // 2 :], axis=0)
        yield (
            _rounded(mean),
            Generation(mean=_round(rewards.mean()), best=_round(rewards.max()), worst=_round(rewards.min())),
        )


def _rounded(values: Floats) -> tuple[float, ...]:
    """As the file has them, so that what was tried is what is kept."""
    return tuple(np.round(values, DECIMALS).tolist())


def _round(value: float) -> float:
    return round(float(value), DECIMALS)


def shaped(rewards: Floats) -> Floats:
    """Ranks from -0.5 (the worst) to 0.5, equals alike: one lucky world counts no more than its place."""
    above = (rewards[:, None] > rewards[None, :]).sum(axis=1)
    below = (rewards[:, None] < rewards[None, :]).sum(axis=1)
    found: Floats = (above - below) / 2 / max(1, len(rewards) - 1)
    return found


def one_by_one(todo: Sequence[tuple[tuple[float, ...], int]]) -> list[float]:
    """Their rewards, in this process."""
    return [reward(values, seed) for values, seed in todo]


def _called(job: tuple[tuple[float, ...], int]) -> float:
    return reward(*job)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=Effort.generations)
    parser.add_argument("--pairs", type=int, default=Effort.pairs, help="of neighbours in a generation")
    parser.add_argument("--worlds", type=int, default=Effort.worlds, help="in which each of them is tried")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    given = parser.parse_args(arguments)
    if given.seed < 0 or min(given.generations, given.pairs, given.worlds, given.jobs) < 1:
        parser.error("--seed is 0 or more; --generations, --pairs, --worlds and --jobs are 1 or more")
    effort = Effort(given.generations, given.pairs, given.worlds)
    if given.jobs == 1:
        _train(given.seed, effort, one_by_one, given.output)
    else:
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            _train(given.seed, effort, lambda todo: list(pool.map(_called, todo)), given.output)


def _train(seed: int, effort: Effort, measures: Measures, output: Path) -> None:
    """Write the file anew after every generation: a training that is ended early leaves a shorter one's."""
    story: tuple[Generation, ...] = ()
    for values, done in trained(seed, effort, measures):
        story = (*story, done)
        command = (
            f"python -m simulator.learning --seed {seed} --generations {len(story)} --pairs {effort.pairs} "
            f"--worlds {effort.worlds}"
        )
        training = Training(command=command, seeds=SEEDS, generations=story)
        found = Parameters(features=FEATURES, hidden=HIDDEN, values=values, training=training)
        output.write_text(found.model_dump_json(indent=1) + "\n")
        print(f"{len(story)}: reward {done.mean:.4f}, {done.worst:.4f} to {done.best:.4f}", flush=True)


if __name__ == "__main__":
    main()

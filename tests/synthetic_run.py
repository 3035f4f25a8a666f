"""Runs made by hand, for tests of what is reckoned from runs: nothing decides in them, and a seed makes one exactly."""

from collections.abc import Iterable, Sequence

import numpy as np

from schemas.base import DeploymentName, NodeId
from schemas.deployment import Placement, Stage
from schemas.slo import Slo
from simulator.records import Arrival, Epoch, NodeUse, Outcome, RunResult, Sample, Spell
from simulator.results import Results, Run, Timeline, summary, timeline
from simulator.scenario import (
    LinkSpec,
    ModelSpec,
    NetworkSpec,
    NodeSpec,
    RequestClass,
    Scenario,
    SiteSpec,
    Workload,
)

TIMEOUT_S = 60.0
DRONE = RequestClass(
    name=DeploymentName("drone"), share=1, prompt_tokens=512, output_tokens=1, slo=Slo(deadline_ms=300)
)
GUIDE = RequestClass(
    name=DeploymentName("guide"), share=1, prompt_tokens=256, output_tokens=16, slo=Slo(ttft_ms=1000, tpot_ms=100)
)
CLASSES = (DRONE, GUIDE)


def outcome(
    at_s: float, took_s: float | None, name: str = "drone", ttft_s: float | None = None, tokens: int = 1
) -> Outcome:
    """A request that took so long, or was refused if `took_s` is None."""
    arrival = Arrival(number=int(at_s * 1e3), at_s=at_s, name=name, site="s", prompt_tokens=8, output_tokens=tokens)
    if took_s is None:
        return Outcome(arrival, error="overloaded")
    first_s = at_s + (took_s if ttft_s is None else ttft_s)
    return Outcome(arrival, first_s=first_s, last_s=at_s + took_s, tokens=tokens, energy_j=2.0)


def chain(*stages: tuple[str, int, int]) -> Placement:
    """One route."""
    return (tuple(Stage(node=NodeId(node), first=first, last=last) for node, first, last in stages),)


def epochs(*placed: tuple[float, Placement], end_s: float = 3600.0) -> list[Epoch]:
    """A plan from each time on."""
    ends = [begin for begin, _ in placed[1:]] + [end_s]
    return [
        Epoch(number, begin, end, placement, "better_plan", f"plan {number}")
        for number, ((begin, placement), end) in enumerate(zip(placed, ends, strict=True), 1)
    ]


def result(outcomes: Iterable[Outcome], end_s: float = 3600.0, **more: object) -> RunResult:
    """A run from 0 to `end_s`."""
    made = RunResult(
        scenario="test",
        policy="full",
        seed=1,
        trace_hash="abc",
        begin_s=0.0,
        end_s=end_s,
        timeout_s=TIMEOUT_S,
        outcomes=list(outcomes),
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made


def synthetic(policy: str, seed: int, slow: float = 1.0, failing: float = 0.0) -> RunResult:
    """Ten minutes: a fault in the middle during which a share of the requests fails, and a plan that answers it.

    Requests and their luck are the seed's alone, so that policies differ by `slow` and `failing` and nothing else."""
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.uniform(30, 630, 1200))
    outcomes = []
    for at_s, luck, took in zip(arrivals, rng.random(1200), rng.lognormal(-2, 0.3, 1200), strict=True):
        hit = 300 <= at_s < 360
        guide = luck < 0.3
        seconds = float(took * slow * (3 if hit else 1)) * (6 if guide else 1)
        failed = hit and (luck * 7919) % 1 < failing
        outcomes.append(
            outcome(
                float(at_s),
                None if failed else seconds,
                "guide" if guide else "drone",
                seconds / 5 if guide else None,
                16 if guide else 1,
            )
        )
    before, after, later = (
        chain(("a-0", 0, 5), ("a-1", 6, 12), ("b-0", 13, 33)),
        chain(("a-0", 0, 5), ("b-1", 6, 12), ("b-0", 13, 33)),
        chain(("a-0", 0, 9), ("b-1", 10, 20), ("b-0", 21, 33)),
    )
    return RunResult(
        scenario="test",
        policy=policy,
        seed=seed,
        trace_hash=f"world-{seed}",
        begin_s=30.0,
        end_s=630.0,
        timeout_s=TIMEOUT_S,
        outcomes=outcomes,
        epochs=epochs((5.0, before), (310.0, after), (480.0, later), end_s=690.0),
        spells=[Spell("a-1", "kill", 300.0, 690.0), Spell("cloud-links", "cloud-links", 300.0, 360.0, 20.0)],
        nodes=[
            NodeUse(NodeId(name), 690.0, hosting, busy, busy * 0.9, 1e4, 0.5)
            for name, hosting, busy in (("a-0", 685.0, 400.0), ("a-1", 305.0, 150.0), ("b-0", 685.0, 420.0))
        ],
        samples=[Sample(float(s), 3, s % 4, 0.5 + 0.3 * float(np.sin(s / 40))) for s in range(30, 630)],
        moved_bytes=2e9,
        planner_s=0.4,
        phi=1.2 * slow,
        events=12_345,
        wall_s=1.5,
    )


def scenario() -> Scenario:
    link = LinkSpec(rtt_ms=1, mbit_per_s=1000)
    return Scenario(
        name=DeploymentName("test"),
        title="A town & its drones",
        duration_s=630,
        model=ModelSpec(
            name="m",
            layers=32,
            hidden=4096,
            layer_bytes=10**8,
            ends_bytes=10**8,
            layer_flops=10**9,
            head_flops=10**9,
            layer_kv_bytes=4096,
        ),
        kinds={"box": NodeSpec(flops_per_s=1e13, bytes_per_s=1e11, memory_bytes=10**10)},
        sites=(SiteSpec(name=NodeId("a"), nodes=2, node="box"), SiteSpec(name=NodeId("b"), nodes=2, node="box")),
        network=NetworkSpec(within=link, between=link, cloud=link),
        workload=Workload(rate_per_s=2, classes=CLASSES),
    )


POLICIES = {"static": (1.3, 0.8), "greedy": (1.6, 0.5), "full": (1.0, 0.1), "clairvoyant": (0.9, 0.0)}
"""How slow each is, and which share of the requests fails under it while the fault lasts."""


def runs_of(policy: str, seeds: Sequence[int], swept: dict[str, float] | None = None) -> list[Run]:
    slow, failing = POLICIES[policy]
    return [summary(synthetic(policy, seed, slow, failing), CLASSES, swept) for seed in seeds]


def results(seeds: Sequence[int] = range(10, 18), shown: tuple[Timeline, ...] | None = None) -> Results:
    """Four policies side by side."""
    return Results(
        scenario=scenario(),
        command="resplit simulate test --seeds 10-17",
        at="2026-01-01 00:00 UTC",
        policies={name: f"what {name} does" for name in POLICIES},
        reference="static",
        system="full",
        bounds=("clairvoyant",),
        runs=tuple(run for name in POLICIES for run in runs_of(name, seeds)),
        shown=shown if shown is not None else (timeline(synthetic("full", 10, 1.0, 0.1)),),
    )

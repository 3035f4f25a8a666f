"""How fast tokens come while something is slow, against the best plan that does without it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults.load import Asked
from benchmarks.faults.measure import quantile, waits
from benchmarks.faults.scene import Scene
from benchmarks.faults.surroundings import SkippedError
from schemas.deployment import Stage
from schemas.plan import PlanEvent

PERIOD_S = 5.0
"""`orchestrator.trigger.PLANNING_PERIOD_S`: what the promise is made of."""
WITHIN = 1.2
WINDOW_S = 2.0
BEST_S = 4.0
SLOW_S = 30.0
HOLD_S = 40.0
"""For so long after it is fast again it has to stay so, on a plan that stays."""
POLL_S = 0.1


@dataclass(frozen=True)
class Recovery:
    """What became of the pace."""

    took_s: float
    """From the disturbance until p95 was within `WITHIN` of the best plan's, for a whole window; at most `SLOW_S`."""
    broken: tuple[str, ...]
    told: dict[str, float]


async def best_s(scene: Scene, stages: tuple[Stage, ...]) -> float:
    """p95 between tokens over these stages, measured; then the planner may choose again."""
    await scene.place(stages)
    await scene.whole()
    await asyncio.sleep(BEST_S)
    now = time.monotonic()
    found = p95(scene.load.asked, now - BEST_S, now)
    await scene.place(None)
    await scene.whole()
    return found


async def recovery(scene: Scene, at: float, best: float, avoid: frozenset[str]) -> Recovery:
    """Watch the pace from the moment `at` that something became slow, `avoid` being the nodes no plan is to join.

    Raises `SkippedError` where the streams never felt it.
    """
    took_s, felt_s = SLOW_S, 0.0
    while (now := time.monotonic()) - at < SLOW_S:
        await asyncio.sleep(POLL_S)
        lately = p95(scene.load.asked, now - WINDOW_S, now)
        felt_s = max(felt_s, lately)
        if now - at > 2 * PERIOD_S and felt_s <= WITHIN * best:
            raise SkippedError("the streams did not feel it: this machine is too busy with other things")
        if now - at > WINDOW_S and felt_s > WITHIN * best >= lately:
            took_s = now - WINDOW_S - at
            break
    held_from = time.monotonic()
    await asyncio.sleep(HOLD_S if took_s < SLOW_S else 0)
    after = p95(scene.load.asked, min(held_from, time.monotonic() - WINDOW_S), time.monotonic())
    plans = scene.ear.commits(at)
    told = {"best_p95_ms": best, "slow_p95_ms": felt_s, "after_p95_ms": after}
    return Recovery(
        took_s,
        _oscillating(plans, avoid),
        {**{name: round(1e3 * value, 1) for name, value in told.items()}, "plans": len(plans)},
    )


def _oscillating(plans: Sequence[PlanEvent], avoid: frozenset[str]) -> tuple[str, ...]:
    """One plan may answer it, and one more may be better still; none may come back to what is slow."""
    uses = [any(avoid <= set(route.nodes) for route in plan.current.routes) for plan in plans if plan.current]
    left = uses.index(False) if False in uses else len(uses)
    found = []
    if any(uses[left:]):
        found.append("a plan came back to what is slow")
    if len(uses) > 2:
        found.append(f"{len(uses)} plans for one disturbance")
    return tuple(found)


def p95(asked: Sequence[Asked], begin: float, end: float) -> float:
    """Of the times between tokens that ended between two moments; none at all is as slow as can be."""
    found = [till - since for one in asked for since, till in waits(one)[1:] if begin <= till <= end]
    return quantile(found, 0.95) if found else SLOW_S

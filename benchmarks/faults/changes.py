"""What operators do under load, and what becomes slow under it."""

import asyncio
import os
import random
import signal
import time

from benchmarks.faults.measure import Seen
from benchmarks.faults.pace import best_s, recovery
from benchmarks.faults.scene import Scene
from resplit import control
from schemas.base import NodeId
from schemas.deployment import Stage

DRAIN_S = 60.0
CALM_S = 60.0
SLICE_S = 0.01
SLOWDOWN = 3
NOISE = 0.2
"""The slowdown is drawn anew for every second, so much more or less."""
NOISE_EVERY_S = 1.0

PLACEMENTS = (
    (Stage(node=NodeId("n0"), first=0, last=4), Stage(node=NodeId("n1"), first=5, last=9)),
    (Stage(node=NodeId("n0"), first=0, last=2), Stage(node=NodeId("n1"), first=3, last=9)),  # cut elsewhere
    (Stage(node=NodeId("n2"), first=0, last=2), Stage(node=NodeId("n1"), first=3, last=9)),  # another ingress
    (Stage(node=NodeId("n2"), first=0, last=2), Stage(node=NodeId("n0"), first=3, last=9)),  # another last stage
)


async def first_placed(scene: Scene) -> None:
    await scene.place(PLACEMENTS[0])


async def every_placement_visited(scene: Scene) -> None:
    for placement in (*PLACEMENTS[1:], PLACEMENTS[0]):
        await scene.place(placement)


async def moved(scene: Scene) -> Seen:
    """To the next placement, all the way: until what was drains no more."""
    stages = await scene.stages()
    place = PLACEMENTS.index(stages) if stages in PLACEMENTS else -1
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.place(PLACEMENTS[(place + 1) % len(PLACEMENTS)])
    until = await scene.went_on(affected)
    await scene.whole()
    return Seen(at, affected, until)


async def drained(scene: Scene) -> Seen:
    node = NodeId(scene.draw.choice(await scene.stages()).node)
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await control.drain_and_wait(scene.cluster.operator, node, DRAIN_S)
    took_s = time.monotonic() - at
    until = await scene.went_on(affected)
    await control.undrain(scene.cluster.operator, node)
    return Seen(at, affected, until, took_s=took_s)


async def joined(scene: Scene) -> Seen:
    """A node that nobody knew, until it runs the last stage: its blocks come from the others, and the caches too."""
    first, last = await scene.stages()
    affected = tuple(scene.load.live)
    at = time.monotonic()
    node = await scene.cluster.join()
    known_s = time.monotonic() - at
    await scene.place((first, Stage(node=node, first=last.first, last=last.last)))
    took_s = time.monotonic() - at
    until = await scene.went_on(affected)
    await scene.whole()
    return Seen(at, affected, until, took_s=took_s, told={"known_s": round(known_s, 2)})


async def left_alone(scene: Scene) -> Seen:
    """Nothing is done: every plan that is made meanwhile is one too many."""
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await asyncio.sleep(CALM_S)
    plans = len(scene.ear.commits(at))
    broken = (f"{plans} plans for nothing",) if plans else ()
    return Seen(at, affected, time.monotonic(), broken=broken, told={"plans": plans})


async def slowed(scene: Scene) -> Seen:
    """The last stage's node gets every third slice of time; nodes are alike, so the best plan is one without it."""
    first, last = await scene.stages()
    spare = NodeId(await scene.spare())
    best = await best_s(scene, (first, Stage(node=spare, first=last.first, last=last.last)))
    node = (await scene.stages())[-1].node
    affected = tuple(scene.load.live)
    at = time.monotonic()
    slowing = asyncio.create_task(slow(scene.cluster.processes[node], scene.draw))
    try:
        found = await recovery(scene, at, best, frozenset({node}))
    finally:
        slowing.cancel()
        await asyncio.wait([slowing])
    return Seen(at, affected, time.monotonic(), took_s=found.took_s, broken=found.broken, told=found.told)


async def slow(pid: int, draw: random.Random) -> None:
    """A process, until cancelled. Of every slice that it runs it stands still for two, more or less."""
    drawn, still_s = 0.0, 0.0
    try:
        while True:
            if time.monotonic() - drawn > NOISE_EVERY_S:
                drawn = time.monotonic()
                still_s = (SLOWDOWN * draw.uniform(1 - NOISE, 1 + NOISE) - 1) * SLICE_S
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(still_s)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(SLICE_S)
    finally:
        os.kill(pid, signal.SIGCONT)

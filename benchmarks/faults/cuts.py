"""Wires between agents that break or become slow, and agents that nothing reaches any more."""

import asyncio
import itertools
import time
from pathlib import Path

from benchmarks.faults.measure import Seen
from benchmarks.faults.pace import PERIOD_S, best_s, recovery
from benchmarks.faults.scene import Scene
from benchmarks.faults.wires import MACHINE
from resplit import control
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.deployment import Stage

ROUND_S = 2 * PERIOD_S
"""By then a plan is to go around an edge that is cut."""
SLOW_BYTES_PER_S = 200_000
"""A step of eight sequences is some kilobytes: at this rate it takes several times as long as it did."""
ZOMBIE_S = 3.0
"""For so long a node that was cut off is listened to when it is back: the kernel then sends what it had not."""
CUT_S = 2.0
POLL_S = 0.1
NOTICED_S = 30.0
MENDED_S = 60.0
GONE = b"the NATS server is gone"
LATE_S = (0.1, 0.5)
LATE_FOR_S = 10.0


async def edge_cut(scene: Scene) -> Seen:
    """Between the two stages; both reach the broker, and are alive."""
    one, other = (stage.node for stage in await scene.stages())
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.wires.cut(one, other)
    try:
        until = await scene.went_on(affected)
        around_s = await _around(scene, at, frozenset({one, other}))
    finally:
        await scene.wires.mend(one, other)
    broken, mended_s = [*_declared_lost(scene, at)], await _known_mended(scene)
    if around_s is None:
        broken.append(f"no plan went around the edge in {ROUND_S:g} s")
    told = {} if around_s is None else {"around_s": round(around_s, 2)}
    return Seen(at, affected, until, broken=tuple(broken), told={**told, "known_mended_s": round(mended_s, 2)})


async def edge_slow(scene: Scene) -> Seen:
    """Between the two stages; the best plan is one without that edge, since nodes are alike."""
    first, last = await scene.stages()
    spare = NodeId(await scene.spare())
    best = await best_s(scene, (first, Stage(node=spare, first=last.first, last=last.last)))
    one, other = (stage.node for stage in await scene.stages())
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.wires.slow(one, other, SLOW_BYTES_PER_S)
    try:
        found = await recovery(scene, at, best, frozenset({one, other}))
    finally:
        await scene.wires.quicken(one, other)
    broken = (*found.broken, *_declared_lost(scene, at))
    return Seen(at, affected, time.monotonic(), took_s=found.took_s, broken=broken, told=found.told)


async def node_cut_off(scene: Scene) -> Seen:
    return await _cut_off(scene, (await scene.stages())[-1].node)


async def ingress_cut_off(scene: Scene) -> Seen:
    return await _cut_off(scene, (await scene.stages())[0].node)


async def _cut_off(scene: Scene, node: str) -> Seen:
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.wires.cut_off(node)
    until = await scene.went_on(affected)
    await asyncio.sleep(CUT_S)
    scene.wire.from_now()
    await scene.wires.take_back(node)
    await asyncio.sleep(ZOMBIE_S)
    broken: tuple[str, ...] = ()
    try:
        await scene.whole()
    except TimeoutError:
        broken = (f"{node} did not come back",)
    return Seen(at, affected, until, broken=broken, repeated=scene.wire.repeated)


async def bus_cut(scene: Scene) -> Seen:
    """From one node, as it writes to it; the nodes still reach each other."""
    first, last = await scene.stages()
    node = (last.node, first.node, await scene.spare())[scene.index % 3]
    log = scene.cluster.log(node)
    told = log.stat().st_size
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.wires.cut(node, MACHINE)
    try:
        lost_s = await _noticed(log, told, at)
        until = await scene.went_on(affected)
    finally:
        scene.wire.from_now()
        await scene.wires.mend(node, MACHINE)
    broken: tuple[str, ...] = ()
    try:
        await scene.whole()
    except TimeoutError:
        broken = (f"{node} did not come back",)
    return Seen(at, affected, until, took_s=lost_s, broken=broken, repeated=scene.wire.repeated)


async def _noticed(log: Path, offset: int, at: float) -> float:
    """When a node said that the server is gone."""
    while (now := time.monotonic()) - at < NOTICED_S:
        with log.open("rb") as file:
            file.seek(offset)
            if GONE in file.read():
                break
        await asyncio.sleep(POLL_S)
    return now - at


async def bus_late(scene: Scene) -> Seen:
    """For one node: what it says comes late, and what it is told."""
    first, last = await scene.stages()
    node = NodeId((last.node, first.node, await scene.spare())[scene.index % 3])
    affected = tuple(scene.load.live)
    at = time.monotonic()
    scene.around.detours[node].delay(*LATE_S)
    await asyncio.sleep(LATE_FOR_S)
    scene.around.detours[node].delay()
    until = await scene.went_on(affected)
    told = {"plans": len(scene.ear.commits(at))}
    step = ("last stage", "ingress", "spare")[scene.index % 3]
    return Seen(at, affected, until, broken=_declared_lost(scene, at), step=step, told=told)


async def _around(scene: Scene, at: float, edge: frozenset[str]) -> float | None:
    """When a plan without that edge was in force."""
    while (now := time.monotonic()) - at < ROUND_S:
        stages = await scene.stages()
        if not any(edge == {a.node, b.node} for a, b in itertools.pairwise((*stages, stages[0]))):
            return now - at
        await asyncio.sleep(POLL_S)
    return None


async def _known_mended(scene: Scene) -> float:
    """How long no node yet says that every link of it is up; the next run needs a way around."""
    began = time.monotonic()
    while (waited_s := time.monotonic() - began) < MENDED_S:
        nodes = (await control.status_on(scene.connection)).nodes
        if all(link.up for node in nodes for link in node.capacity.links):
            break
        await asyncio.sleep(POLL_S)
    return waited_s


def _declared_lost(scene: Scene, at: float) -> tuple[str, ...]:
    """Nodes that were called lost though they live."""
    return tuple(f"{node} was called lost" for node in scene.ear.audited(AuditKind.NODE_LOST, at))

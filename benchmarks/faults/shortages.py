"""What a machine may lack: the right time, room on a disk, memory."""

import asyncio
import re
import resource
import shutil
import time

import psutil

from benchmarks.faults.changes import PLACEMENTS
from benchmarks.faults.measure import Seen
from benchmarks.faults.scene import Scene
from bus.identity import ORCHESTRATOR
from resplit import control
from resplit.server import NATS
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError

HOUR_S = 3600
SKEWED_S = 8.0
"""So long a clock is wrong: agents hear who leads every few seconds."""
FULL_S = 3.0
ALARM_S = 30.0
ALARM_BYTES = 1 << 20
"""What a disk whose free room is less than this is told to be: full."""
FEW_BYTES = 1 << 20
POLL_S = 0.05
SPARE = NodeId("n2")
"""The node whose disk is small."""
UPON_SPARE = (PLACEMENTS[0][0], PLACEMENTS[0][1].model_copy(update={"node": SPARE}))
LARGE = DeploymentName("large")


async def clock_skewed(scene: Scene) -> Seen:
    """An hour ahead or behind: of the last stage, the ingress and the orchestrator in turn."""
    first, last = await scene.stages()
    victim = (last.node, first.node, ORCHESTRATOR)[scene.index // 2 % 3]
    ahead_s = HOUR_S if scene.index % 2 == 0 else -HOUR_S
    affected = tuple(scene.load.live)
    at = time.monotonic()
    scene.clocks.set(victim, ahead_s)
    await asyncio.sleep(SKEWED_S)
    scene.clocks.set(victim, 0)
    until = await scene.went_on(affected)
    await asyncio.sleep(1)
    broken = [f"{node} was called lost" for node in scene.ear.audited(AuditKind.NODE_LOST, at)]
    if plans := len(scene.ear.commits(at)):
        broken.append(f"{plans} plans for nothing")
    return Seen(at, affected, until, broken=tuple(broken), step=f"{victim} {ahead_s:+d} s")


async def spare_is_empty(scene: Scene) -> None:
    """The plan in force does without the node whose disk is small."""
    await scene.place(PLACEMENTS[0])


async def agents_disk_full(scene: Scene) -> Seen:
    """A node without a file of the model and without room for one is to take the last stage; and again with room, until
    that is taken away too."""
    disk = scene.around.disks[f"{SPARE}/store"]
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.cluster.kill(SPARE)
    for entry in disk.folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    disk.fill()
    await scene.cluster.start(SPARE)
    in_force = await scene.stages()
    broken = []
    try:
        await scene.place(UPON_SPARE)
        broken.append("files were placed where there was no room")
    except ResplitError as error:
        if error.code is not ErrorCode.MODEL_TOO_LARGE or not re.search(r"\d bytes", error.message):
            broken.append(f"refused as {error.code}: {error.message}")
    if await scene.stages() != in_force:
        broken.append("the plan in force is another one")
    disk.free()
    await scene.place(UPON_SPARE)
    full = time.monotonic()
    disk.fill()
    told_s = await _told(scene, full)
    disk.free()
    await scene.place(PLACEMENTS[0])
    until = await scene.went_on(affected)
    return Seen(at, affected, until, took_s=told_s, broken=tuple(broken))


async def _told(scene: Scene, since: float) -> float:
    """How long it took until the control plane knew that the disk is full."""
    while time.monotonic() - since < ALARM_S:
        status = await control.status_on(scene.connection)
        if any(n.capacity.node == SPARE and n.capacity.disk_free_bytes < ALARM_BYTES for n in status.nodes):
            break
        await asyncio.sleep(POLL_S)
    return time.monotonic() - since


async def servers_disk_full(scene: Scene) -> Seen:
    """JetStream has no room for a few seconds, and its server is started again once there is some."""
    disk = scene.around.disks[NATS]
    affected = tuple(scene.load.live)
    at = time.monotonic()
    disk.fill()
    await asyncio.sleep(FULL_S)
    disk.free()
    await scene.cluster.kill(NATS)
    await scene.cluster.start(NATS)
    back = time.monotonic()
    until = await scene.went_on(affected)
    return Seen(at, affected, until, since=back)


async def every_disk_full(scene: Scene) -> Seen:
    """One disk for everything: what the server keeps, the nodes' files, what they remember, the logs. A node is killed
    while it is full."""
    disk = scene.around.disks[""]
    node = (await scene.stages())[scene.index % 2].node
    affected = tuple(scene.load.live)
    at = time.monotonic()
    disk.fill()
    await asyncio.sleep(FULL_S)
    await scene.cluster.kill(node)
    disk.free()
    await scene.cluster.kill(NATS)
    await scene.cluster.start(NATS)
    back = time.monotonic()
    until = await scene.went_on(affected)
    await scene.cluster.start(node)
    return Seen(at, affected, until, since=back)


async def memory_short(scene: Scene) -> Seen:
    """The node that is to take the last stage is given next to nothing more than it has."""
    first, last = await scene.stages()
    spare = NodeId(await scene.spare())
    pid = scene.cluster.processes[spare]
    affected = tuple(scene.load.live)
    at = time.monotonic()
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + FEW_BYTES, before[1]))
    broken = []
    try:
        await scene.place((first, Stage(node=spare, first=last.first, last=last.last)))
        how = "it had room"
    except ResplitError as error:
        how = error.code.value
        if await scene.stages() != (first, last):
            broken.append("the plan in force is another one")
    if spare in scene.cluster.processes:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    else:
        how = f"it ended, {how}"
        await scene.cluster.start(spare)
    await scene.place(None)
    until = await scene.went_on(affected)
    return Seen(at, affected, until, broken=tuple(broken), step=how)


async def model_too_large(scene: Scene) -> Seen:
    """Caches for so many and so long sequences that no cut of the model fits."""
    context = scene.draw.choice([1 << 17, 1 << 18, 1 << 19, 1 << 20])
    settings = Settings(context_tokens=context, max_sequences=scene.draw.randint(64, 256))
    affected = tuple(scene.load.live)
    broken = []
    at = time.monotonic()
    try:
        await control.deploy(scene.cluster.operator, DeployRequest(name=LARGE, model="adder", settings=settings))
        broken.append("it was taken")
    except ResplitError as error:
        if error.code is not ErrorCode.MODEL_TOO_LARGE or not re.search(r"\d.* bytes .*short|short.*\d", error.message):
            broken.append(f"refused as {error.code}: {error.message}")
    took_s = time.monotonic() - at
    if plans := len(scene.ear.commits(at)):
        broken.append(f"{plans} plans")
    until = await scene.went_on(affected)
    return Seen(at, affected, until, took_s=took_s, broken=tuple(broken))

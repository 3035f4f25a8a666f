"""What a machine may lack: the right time, room on a disk, memory."""

import asyncio
import re
import resource
import shutil
import time

import psutil

from benchmarks.faults.changes import PLACEMENTS
from benchmarks.faults.measure import Seen
from benchmarks.faults.scene import Scene, request
from bus.identity import ORCHESTRATOR
from resplit import control
from resplit.server import NATS
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Receipt, ReceiptStatus

HOUR_S = 3600
SKEWED_S = 8.0
"""So long a clock is wrong: agents hear who leads every few seconds."""
FULL_S = 3.0
TOLD_S = 60.0
UNHEARD_S = 6.0
"""Nobody hears that a process ends while the server is away: it is lost when it is silent, as if it hung."""
FULL_BYTES = 1 << 20
"""A disk with less room than this is full."""
LOADED_S = 30.0
FEW_BYTES = 1 << 20
POLL_S = 0.05
SPARE = NodeId("n2")
"""The node whose disk is small."""
UPON_SPARE = (PLACEMENTS[0][0], PLACEMENTS[0][1].model_copy(update={"node": SPARE}))
INGRESS = "ingress"
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
    broken = tuple(f"{node} was called lost" for node in scene.ear.audited(AuditKind.NODE_LOST, at))
    whose = "orchestrator's" if victim == ORCHESTRATOR else "ingress's" if victim == first.node else "last stage's"
    step = f"{whose}, {'ahead' if ahead_s > 0 else 'behind'}"
    return Seen(at, affected, until, broken=broken, step=step, told={"plans": len(scene.ear.commits(at))})


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
    await _until_told(scene, False)
    await scene.place(UPON_SPARE)
    full = time.monotonic()
    disk.fill()
    await _until_told(scene, True)
    told_s = time.monotonic() - full
    disk.free()
    await scene.place(PLACEMENTS[0])
    until = await scene.went_on(affected)
    return Seen(at, affected, until, took_s=told_s, broken=tuple(broken))


async def _until_told(scene: Scene, full: bool) -> None:
    """Wait until the control plane knows that the disk is full, or is not."""
    async with asyncio.timeout(TOLD_S):
        while True:
            status = await control.status_on(scene.connection)
            free = next(n.capacity.disk_free_bytes for n in status.nodes if n.capacity.node == SPARE)
            if (free < FULL_BYTES) == full:
                break
            await asyncio.sleep(POLL_S)


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
    ingress, last = await scene.stages()
    node, step = ((ingress.node, INGRESS), (last.node, "last stage"))[scene.index % 2]
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
    return Seen(at, affected, until, since=back, step=step)


async def memory_short(scene: Scene) -> Seen:
    """The node that is to take the last stage is given next to nothing more than it has, until it has said that it
    cannot load, or has ended, or has loaded all the same."""
    first, last = await scene.stages()
    spare = NodeId(await scene.spare())
    pid = scene.cluster.processes[spare]
    affected = tuple(scene.load.live)
    at = time.monotonic()
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + FEW_BYTES, before[1]))
    placement = (first, Stage(node=spare, first=last.first, last=last.last))
    await control.deploy(scene.cluster.operator, request(placement))
    how = await _end_of_loading(scene, spare, at)
    if spare in scene.cluster.processes:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    else:
        await scene.cluster.start(spare)
    await scene.place(None)
    until = await scene.went_on(affected)
    return Seen(at, affected, until, broken=("nothing came of it",) if how is None else (), step=how)


async def _end_of_loading(scene: Scene, node: NodeId, at: float) -> str | None:
    """What became of a plan that the node is to load."""
    while time.monotonic() - at < LOADED_S:
        if node not in scene.cluster.processes:
            return "it ended"
        for when, word in scene.ear.heard:
            if when >= at and isinstance(word, Receipt) and word.node == node:
                return "it refused" if word.status is ReceiptStatus.REFUSED else "it had room"
        await asyncio.sleep(POLL_S)
    return None


async def model_too_large(scene: Scene) -> Seen:
    """Caches for so many and so long sequences that no cut of the model fits."""
    # Half a gigabyte and more.
    settings = Settings(context_tokens=256, max_sequences=scene.draw.randint(900, 1024))
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

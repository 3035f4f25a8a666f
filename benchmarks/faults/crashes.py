"""Processes that are killed, or that hang."""

import asyncio
import time
from collections.abc import Callable

from benchmarks.faults.load import DEPLOYMENT
from benchmarks.faults.measure import Seen
from benchmarks.faults.scene import Scene, Word, request
from bus.sealed_plans import open_event
from bus.streams import stored_messages
from resplit import control
from resplit.server import NATS
from schemas import subjects
from schemas.base import NodeId
from schemas.control import DeployReply
from schemas.deployment import Stage
from schemas.envelope import PLAN_TYPE, open_envelope
from schemas.errors import ResplitError
from schemas.leader import Leadership
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus
from schemas.section import SealedEvent

OUTAGE_S = 2.0
ZOMBIE_S = 1.0
"""For so long a process that hung is listened to after it goes on."""
LOADING_S = 0.01
"""Between the word that a plan is to be loaded and the end of one who loads it, at most."""
STEP_S = 30.0
AGAIN_S = 0.1
"""A step of the protocol that has not come for so long is not coming."""
SPREAD_S = 0.02
"""Between a step of the protocol and the end of the leader, at most: what it does next may have begun."""


async def agent_killed(scene: Scene) -> Seen:
    return await _killed(scene, (await scene.stages())[-1].node)


async def ingress_killed(scene: Scene) -> Seen:
    return await _killed(scene, (await scene.stages())[0].node)


async def _killed(scene: Scene, node: str) -> Seen:
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.cluster.kill(node)
    until = await scene.went_on(affected)
    await scene.cluster.start(node)
    return Seen(at, affected, until)


async def agent_hung(scene: Scene) -> Seen:
    return await _hung(scene, (await scene.stages())[-1].node)


async def ingress_hung(scene: Scene) -> Seen:
    return await _hung(scene, (await scene.stages())[0].node)


async def _hung(scene: Scene, node: str) -> Seen:
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.cluster.pause(node)
    until = await scene.went_on(affected)
    scene.wire.from_now()
    await scene.cluster.resume(node)
    await asyncio.sleep(ZOMBIE_S)
    broken: tuple[str, ...] = ()
    try:
        await scene.whole()
    except TimeoutError:
        broken = (f"{node} did not come back",)
    return Seen(at, affected, until, broken=broken, repeated=scene.wire.repeated)


async def killed_while_loading(scene: Scene) -> Seen:
    """Until READY is not heard from it before it is gone, which a fast load may manage."""
    ingress, spare = (await scene.stages())[0].node, await scene.spare()
    placement = (Stage(node=NodeId(ingress), first=0, last=4), Stage(node=NodeId(spare), first=5, last=9))
    affected = tuple(scene.load.live)
    asked_at = time.monotonic()
    deploying = asyncio.create_task(control.deploy(scene.cluster.operator, request(placement)))
    await scene.ear.wait(lambda word: isinstance(word, PlanEvent) and word.phase is PlanPhase.PREPARE, asked_at, 30)
    await asyncio.sleep(scene.draw.uniform(0, LOADING_S))
    at = time.monotonic()
    await scene.cluster.kill(spare)
    await deploying
    until = await scene.went_on(affected)
    ready = [w for t, w in scene.ear.heard if t >= asked_at and isinstance(w, Receipt) and w.node == spare]
    too_late = any(word.status is ReceiptStatus.READY for word in ready)
    await scene.cluster.start(spare)
    await control.deploy(scene.cluster.operator, request(None))
    broken = ("it had loaded before it was killed; this run says nothing",) if too_late else ()
    return Seen(at, affected, until, broken=broken)


STEPS: dict[str, Callable[[Word], bool]] = {
    "preparing": lambda word: isinstance(word, PlanEvent) and word.phase is PlanPhase.PREPARE,
    "half ready": lambda word: isinstance(word, Receipt) and word.status is ReceiptStatus.READY,
    "committed": lambda word: isinstance(word, PlanEvent) and word.phase is PlanPhase.COMMIT,
    "applied": lambda word: isinstance(word, Receipt) and word.status is ReceiptStatus.APPLIED,
    "drained": lambda word: isinstance(word, Receipt) and word.status is ReceiptStatus.DRAINED,
    "retiring": lambda word: isinstance(word, PlanEvent) and word.phase is PlanPhase.RETIRE,
}
"""The steps of the protocol, by the first word that tells of each."""
ASKED = "asked"


async def leader_killed(scene: Scene) -> Seen:
    """At one step of a redeploy after the other: as soon as it is asked for, then at the first word of each step."""
    step = (ASKED, *STEPS)[scene.index % (1 + len(STEPS))]
    leader = await scene.leader()
    placement = _another(scene, await scene.stages())
    affected = tuple(scene.load.live)
    asked = time.monotonic()
    asking = asyncio.create_task(control.deploy(scene.cluster.operator, request(placement)))
    if step in STEPS:
        await scene.ear.wait(STEPS[step], asked, STEP_S)
    await asyncio.sleep(scene.draw.uniform(0, SPREAD_S))
    at = time.monotonic()
    await scene.cluster.kill(leader)
    elected, _ = await scene.ear.wait(lambda word: isinstance(word, Leadership) and word.leader != leader, at, STEP_S)
    await _until_taken(scene, asking, placement)
    until = await scene.went_on(affected)
    await scene.cluster.start(leader)
    await scene.whole()
    broken = await _disputed(scene)
    if await scene.stages() != placement:
        broken.append(f"killed when {step}: the successor neither completed nor repeated what was under way")
    return Seen(at, affected, until, took_s=elected - at, broken=tuple(broken), step=step)


async def leader_hung(scene: Scene) -> Seen:
    """Stopped at a step of a redeploy, past its lease, and resumed when another leads: it takes itself for the leader
    until it looks."""
    step = tuple(STEPS)[scene.index % len(STEPS)]
    leader = await scene.leader()
    placement = _another(scene, await scene.stages())
    affected = tuple(scene.load.live)
    asked = time.monotonic()
    asking = asyncio.create_task(control.deploy(scene.cluster.operator, request(placement)))
    await scene.ear.wait(STEPS[step], asked, STEP_S)
    await asyncio.sleep(scene.draw.uniform(0, SPREAD_S))
    at = time.monotonic()
    await scene.cluster.pause(leader)
    elected, _ = await scene.ear.wait(lambda word: isinstance(word, Leadership) and word.leader != leader, at, STEP_S)
    await asyncio.sleep(scene.draw.uniform(0, ZOMBIE_S))
    await scene.cluster.resume(leader)
    await _until_taken(scene, asking, placement)
    until = await scene.went_on(affected)
    await scene.whole()
    broken = await _disputed(scene)
    if await scene.stages() != placement:
        broken.append(f"hung when {step}: the successor neither completed nor repeated what was under way")
    return Seen(at, affected, until, took_s=elected - at, broken=tuple(broken), step=step)


def _another(scene: Scene, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Two stages on other nodes, cut elsewhere."""
    cut = scene.draw.choice([cut for cut in range(1, 9) if cut != stages[0].last])
    nodes = scene.draw.sample(scene.cluster.agents, 2)
    return Stage(node=nodes[0], first=0, last=cut), Stage(node=nodes[1], first=cut + 1, last=9)


async def _until_taken(scene: Scene, asking: asyncio.Task[DeployReply], placement: tuple[Stage, ...]) -> None:
    """Where a wish was never stored, its owner asks again, until there is somebody to ask."""
    async with asyncio.timeout(STEP_S):
        while True:
            try:
                await asking
                break
            except ResplitError:
                await asyncio.sleep(AGAIN_S)
                asking = asyncio.create_task(control.deploy(scene.cluster.operator, request(placement)))


async def _disputed(scene: Scene) -> list[str]:
    """What the log of plans holds against its leaders: an epoch of two plans, a term that ended and goes on."""
    owner = await scene.cluster.owner("CONTROL")
    try:
        stored = await stored_messages(owner.jetstream(), subjects.STREAM_PLANS, subjects.plan(DEPLOYMENT))
    finally:
        await owner.close()
    broken: list[str] = []
    plans: dict[int, Plan] = {}
    term = 0
    for message in stored:
        sealed, signer = open_envelope(message.data, SealedEvent, PLAN_TYPE, scene.ear.identity.orchestrators)
        event = open_event(sealed, signer, scene.ear.identity)
        if event.term < term:
            broken.append(f"a word of term {event.term} behind one of term {term}")
        term = max(term, event.term)
        if event.current is not None and plans.setdefault(event.current.epoch, event.current) != event.current:
            broken.append(f"two plans of epoch {event.current.epoch} were in force")
    return broken


async def nats_killed(scene: Scene) -> Seen:
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.cluster.kill(NATS)
    await asyncio.sleep(OUTAGE_S)
    await scene.cluster.start(NATS)
    back = time.monotonic()
    until = await scene.went_on(affected)
    return Seen(at, affected, until, since=back)

"""The faults: what each does, what is promised under it, and within which bound."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.faults.load import Asked
from benchmarks.faults.measure import Run, Seen, quantile, waits
from benchmarks.faults.scene import Scene, request
from resplit import control
from resplit.server import NATS
from schemas.base import NodeId
from schemas.deployment import Stage
from schemas.errors import ResplitError
from schemas.leader import Leadership
from schemas.plan import PlanEvent, PlanPhase, Receipt, ReceiptStatus

LEASE_S = 3.0
"""`orchestrator.lease.LEASE_S`: what the promise is made of, not what happens to be configured."""
OUTAGE_S = 2.0
ZOMBIE_S = 1.0
"""For so long a process that hung is listened to after it goes on."""
REDEPLOY_S = 0.4
"""About what a redeploy takes here: somewhere in it the leader is killed."""
LOADING_S = 0.01
"""Between the word that a plan is to be loaded and the end of one who loads it, at most."""
DRAIN_S = 60.0
PERIOD_S = 5.0
SLICE_S = 0.01
SLOWDOWN = 3
WITHIN = 1.2
SLOW_S = 30.0
POLL_S = 0.1
WINDOW_S = 2.0
GAP_S = 0.08
GAPS = 3


class SkippedError(Exception):
    """This fault cannot be tried here; the reason is its text."""


@dataclass(frozen=True)
class Scenario:
    """One fault and its promise."""

    name: str
    fault: str
    promise: str
    bound: str
    """In words, as the table has it."""
    holds: Callable[[Run], float | None]
    """By how many seconds a run exceeds the bound (negative: it is within), or None where there is no bound."""
    measures: Literal["resume_s", "gap_s", "took_s"]
    act: Callable[[Scene], Awaitable[Seen]]
    orchestrators: int = 1
    runs_max: int | None = None
    """Where a cluster can go through it only so often."""
    prepare: Callable[[Scene], Awaitable[None]] | None = None
    """Done once, before the first run."""


async def agent_killed(scene: Scene) -> Seen:
    return await _killed(scene, (await scene.stages())[-1].node)


async def ingress_killed(scene: Scene) -> Seen:
    return await _killed(scene, (await scene.stages())[0].node)


async def _killed(scene: Scene, node: str) -> Seen:
    affected = scene.load.live
    at = time.monotonic()
    await scene.cluster.kill(node)
    until = await scene.went_on(affected)
    await scene.cluster.start(node)
    return Seen(at, tuple(affected), until)


async def agent_hung(scene: Scene) -> Seen:
    return await _hung(scene, (await scene.stages())[-1].node)


async def ingress_hung(scene: Scene) -> Seen:
    return await _hung(scene, (await scene.stages())[0].node)


async def _hung(scene: Scene, node: str) -> Seen:
    affected = scene.load.live
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
    return Seen(at, tuple(affected), until, broken=broken, repeated=scene.wire.repeated)


async def killed_while_loading(scene: Scene) -> Seen:
    """Until READY is not heard from it before it is gone, which a fast load may manage."""
    ingress, spare = (await scene.stages())[0].node, await scene.spare()
    placement = (Stage(node=NodeId(ingress), first=0, last=4), Stage(node=NodeId(spare), first=5, last=9))
    affected = scene.load.live
    asked_at = time.monotonic()
    deploying = asyncio.create_task(control.deploy(scene.cluster.url, request(placement)))
    await scene.ear.wait(lambda word: isinstance(word, PlanEvent) and word.phase is PlanPhase.PREPARE, asked_at, 30)
    await asyncio.sleep(scene.draw.uniform(0, LOADING_S))
    at = time.monotonic()
    await scene.cluster.kill(spare)
    await deploying
    until = await scene.went_on(affected)
    ready = [w for t, w in scene.ear.heard if t >= asked_at and isinstance(w, Receipt) and w.node == spare]
    too_late = any(word.status is ReceiptStatus.READY for word in ready)
    await scene.cluster.start(spare)
    await control.deploy(scene.cluster.url, request(None))
    broken = ("it had loaded before it was killed; this run says nothing",) if too_late else ()
    return Seen(at, tuple(affected), until, broken=broken)


async def leader_killed(scene: Scene) -> Seen:
    leader = await scene.leader()
    stages = await scene.stages()
    cut = scene.draw.choice([cut for cut in range(1, 9) if cut != stages[0].last])
    nodes = scene.draw.sample(scene.cluster.agents, 2)
    placement = (Stage(node=nodes[0], first=0, last=cut), Stage(node=nodes[1], first=cut + 1, last=9))
    affected = scene.load.live
    asking = asyncio.create_task(control.deploy(scene.cluster.url, request(placement)))
    await asyncio.sleep(scene.draw.uniform(0, REDEPLOY_S))
    at = time.monotonic()
    await scene.cluster.kill(leader)
    elected, _ = await scene.ear.wait(lambda word: isinstance(word, Leadership) and word.leader != leader, at, 30)
    broken: tuple[str, ...] = ()
    try:
        await asking
    except ResplitError:
        await control.deploy(scene.cluster.url, request(placement))  # it was never stored, and its owner asks again
    until = await scene.went_on(affected)
    await scene.cluster.start(leader)
    await scene.whole()
    if await scene.stages() != placement:
        broken = ("the successor neither completed nor repeated what was under way",)
    return Seen(at, tuple(affected), until, took_s=elected - at, broken=broken)


async def nats_killed(scene: Scene) -> Seen:
    affected = scene.load.live
    at = time.monotonic()
    await scene.cluster.kill(NATS)
    await asyncio.sleep(OUTAGE_S)
    await scene.cluster.start(NATS)
    back = time.monotonic()
    until = await scene.went_on(affected)
    return Seen(at, tuple(affected), until, since=back)


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
    affected = scene.load.live
    at = time.monotonic()
    await scene.place(PLACEMENTS[(place + 1) % len(PLACEMENTS)])
    until = await scene.went_on(affected)
    await scene.whole()
    return Seen(at, tuple(affected), until)


async def drained(scene: Scene) -> Seen:
    node = NodeId(scene.draw.choice(await scene.stages()).node)
    affected = scene.load.live
    at = time.monotonic()
    await control.drain_and_wait(scene.cluster.url, node, DRAIN_S)
    took_s = time.monotonic() - at
    until = await scene.went_on(affected)
    await control.undrain(scene.cluster.url, node)
    return Seen(at, tuple(affected), until, took_s=took_s)


async def slowed(scene: Scene) -> Seen:
    """The last stage's node gets every third slice of time; nodes are alike, so the best plan is one without it."""
    undisturbed_s = _p95(scene.load.asked, time.monotonic())
    node = (await scene.stages())[-1].node
    pid = scene.cluster.processes[node]
    at = time.monotonic()
    slowing = asyncio.create_task(_slow(pid))
    felt = False
    try:
        took_s = SLOW_S
        while (now := time.monotonic()) - at < SLOW_S:
            await asyncio.sleep(POLL_S)
            is_slow = _p95(scene.load.asked, now) > WITHIN * undisturbed_s
            felt = felt or is_slow
            if now - at > 2 * PERIOD_S and not scene.ear.decisions:
                raise SkippedError(
                    "no decision was heard within two planning periods: this orchestrator has no trigger"
                )
            if now - at > 2 * PERIOD_S and not felt:
                raise SkippedError("the streams did not feel it: this machine is too busy with other things")
            if now - at > WINDOW_S and felt and not is_slow and scene.ear.decisions:
                took_s = now - WINDOW_S - at
                break
    finally:
        slowing.cancel()
        await asyncio.wait([slowing])
    return Seen(at, tuple(scene.load.live), time.monotonic(), took_s=took_s)


async def _slow(pid: int) -> None:
    try:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep((SLOWDOWN - 1) * SLICE_S)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(SLICE_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def _p95(asked: list[Asked], now: float) -> float:
    """Of the times between tokens in the window before `now`."""
    found = [end - begin for one in asked for begin, end in waits(one)[1:] if now - WINDOW_S <= end <= now]
    return quantile(found, 0.95) if found else SLOW_S


async def cut_off(scene: Scene) -> Seen:
    raise SkippedError("a local cluster's agents share one loopback interface, on which no pair can be cut off alone")


def within(bound_s: float, of: Literal["resume_s", "gap_s", "took_s"] = "resume_s") -> Callable[[Run], float | None]:
    return lambda run: getattr(run, of) - bound_s


def smooth(run: Run) -> float:
    return run.gap_s - max(GAPS * run.median_gap_s, GAP_S)


def unbounded(_: Run) -> None:
    return None


ANSWERED = "every accepted request ends in the right tokens"
SCENARIOS = (
    Scenario("agent-killed", "agent killed (SIGKILL)", ANSWERED, "resumes <= 1 s", within(1), "resume_s", agent_killed),
    Scenario(
        "ingress-killed",
        "ingress killed (SIGKILL)",
        f"{ANSWERED}, said by a successor",
        "resumes <= 1 s",
        within(1),
        "resume_s",
        ingress_killed,
    ),
    Scenario(
        "agent-hung",
        "agent hung (SIGSTOP), then resumed",
        f"{ANSWERED}; its late output is refused",
        "resumes <= 6 s",
        within(6),
        "resume_s",
        agent_hung,
    ),
    Scenario(
        "ingress-hung",
        "ingress hung (SIGSTOP), then resumed",
        f"{ANSWERED}; it says nothing new once it has a successor",
        "resumes <= 6 s",
        within(6),
        "resume_s",
        ingress_hung,
    ),
    Scenario(
        "killed-loading",
        "agent killed while it loads a plan",
        f"{ANSWERED}; the plan in force serves on",
        "resumes <= 5 s",
        within(5),
        "resume_s",
        killed_while_loading,
    ),
    Scenario(
        "leader-killed",
        "orchestrator killed in a redeploy, another stands by",
        f"{ANSWERED}; the successor completes or repeats it",
        f"takes over <= {LEASE_S + 1:g} s",
        within(LEASE_S + 1, "took_s"),
        "took_s",
        leader_killed,
        orchestrators=2,
    ),
    Scenario(
        "nats-killed",
        f"nats-server killed, back after {OUTAGE_S:g} s",
        ANSWERED,
        "resumes <= 2 s after its return",
        within(2),
        "resume_s",
        nats_killed,
    ),
    Scenario(
        "moved",
        "re-split or redistribution, blocks staged",
        ANSWERED,
        f"gap <= max({GAPS}x median, {GAP_S * 1e3:g} ms)",
        smooth,
        "gap_s",
        moved,
        prepare=every_placement_visited,
    ),
    Scenario(
        "moved-cold",
        "the same, blocks loaded for the first time",
        ANSWERED,
        "none: reported apart",
        unbounded,
        "gap_s",
        moved,
        runs_max=len(PLACEMENTS) - 1,
        prepare=first_placed,
    ),
    Scenario("drained", "node drained", ANSWERED, "none: time until it may go", unbounded, "took_s", drained),
    Scenario(
        "slowed",
        f"node slowed {SLOWDOWN}x",
        f"p95 between tokens within {WITHIN:g}x of the best plan's",
        f"<= {2 * PERIOD_S:g} s",
        within(2 * PERIOD_S, "took_s"),
        "took_s",
        slowed,
        runs_max=2,
    ),
    Scenario(
        "cut-off",
        "two agents cut off from each other, both reach NATS",
        f"{ANSWERED}; the next plan avoids the edge",
        "resumes <= 5 s",
        within(5),
        "resume_s",
        cut_off,
    ),
)

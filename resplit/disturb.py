"""What the demonstration does to its cluster while it answers: a node slows, one is killed, one joins.

The load are streams that never pause, so that a token that comes late is seen; each is compared with the uncut model.
"""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from resplit import control
from resplit.client import Client
from resplit.cluster import LocalCluster
from resplit.replies import RequestError
from schemas.base import DeploymentName, Digest, NodeId
from schemas.control import DeploymentStatus, DeployRequest
from schemas.deployment import Settings
from schemas.plan import Plan

STREAMS = 8
STREAM_TOKENS = 200
CHUNK_TOKENS = 8
SETTINGS = Settings(chunk_tokens=CHUNK_TOKENS, context_tokens=256, max_sequences=32, max_queued=64)
"""As many slots of the longest class as there are streams."""
STAGES = 2
STEADY_S = 3.0
SLOWER = 3
SLICE_S = 0.01
"""A slowed process runs this long at a time, and stands still for `SLOWER` - 1 times as long."""
ACT_S = 45.0
"""The orchestrator weighs plans every 5 s, and believes what it measures only after a while."""
POLL_S = 0.1
DEPLOY_S = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Streamed:
    """One stream of the load, from its first token to its last."""

    prompt: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Disturbance:
    """One disturbance and what came of it. Times in seconds."""

    what: str
    answer: str
    """Why the plan that followed was made, in the orchestrator's words."""
    acted_s: float | None
    """From the disturbance to the plan that answers it; None if none did."""
    worst_gap_s: float
    """The longest that any stream waited for a token meanwhile."""
    before_s: float
    after_s: float
    """What a token took, in the median: before the disturbance, and once the new plan was in force."""


@dataclass
class Load:
    """Streams that run until they are told to stop."""

    client: Client
    deployment: DeploymentName
    streamed: list[Streamed] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when the token came, how long after the one before) over all streams."""
    stopping: bool = False

    async def run(self) -> None:
        await asyncio.gather(*(self._stream(f"{17 * i + 3}+{29 * i + 41}=") for i in range(STREAMS)))

    async def _stream(self, prompt: str) -> None:
        while not self.stopping:
            ids: list[int] = []
            last: float | None = None
            try:
                async for token in self.client.stream(
                    self.deployment, prompt, max_tokens=STREAM_TOKENS, ignore_eos=True
                ):
                    now = time.monotonic()
                    if last is not None:
                        self.gaps.append((now, now - last))
                    last = now
                    ids.append(token.token_id)
            except RequestError as error:
                self.errors.append(str(error))
                await asyncio.sleep(POLL_S)
            else:
                self.streamed.append(Streamed(prompt, tuple(ids)))

    def median_s(self, start: float, end: float) -> float:
        """What a token took between two moments, in the median."""
        return statistics.median([gap for at, gap in self.gaps if start <= at <= end] or [0.0])

    def worst_s(self, start: float, end: float) -> float:
        return max((gap for at, gap in self.gaps if start <= at <= end), default=0.0)


async def disturb(
    cluster: LocalCluster, deployment: DeploymentName, model: Digest, say: Say
) -> tuple[tuple[Disturbance, ...], Load, str]:
    """Slow a node, kill another, add a third, under load: what came of each, the load, and the last decision."""
    request = DeployRequest(name=deployment, model=model, settings=SETTINGS, stages=STAGES)
    await control.deploy_and_wait(cluster.operator, request, DEPLOY_S)
    found: list[Disturbance] = []
    async with Client(cluster.url, keys=cluster.client_keys) as client:
        load = Load(client, deployment)
        running = asyncio.create_task(load.run())
        await asyncio.sleep(STEADY_S)
        plan = await _current(cluster, deployment)
        slow = NodeId(plan.routes[0].stages[-1].node)
        say(f"{slow}, which runs the end of the model, now gets a third of its time")
        async with slowed(cluster, slow):
            found.append(await _await_plan(cluster, load, f"{slow} slowed {SLOWER}x", plan, slow, say))
            plan = await _current(cluster, deployment)
            killed = NodeId(plan.routes[0].source)
            say(f"killing {killed}, where the requests came in")
            await cluster.kill(killed)
            found.append(await _await_plan(cluster, load, f"{killed} killed, the ingress", plan, killed, say))
            plan = await _current(cluster, deployment)
            say("a node joins")
            began = time.monotonic()
            joined = await cluster.join()
            what = f"{joined} joined, {slow} still slow"
            found.append(await _await_plan(cluster, load, what, plan, slow, say, began))
        load.stopping = True
        await running
    reply = await control.explain(cluster.operator, deployment)
    return tuple(found), load, reply.decisions[0].sentence if reply.decisions else ""


@asynccontextmanager
async def slowed(cluster: LocalCluster, node: NodeId) -> AsyncIterator[None]:
    """Let an agent's process run a `SLOWER`th of the time, as a machine that throttles would."""

    async def throttle() -> None:
        while (pid := cluster.processes.get(node)) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep((SLOWER - 1) * SLICE_S)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(SLICE_S)

    throttling = asyncio.create_task(throttle())
    try:
        yield
    finally:
        throttling.cancel()
        await asyncio.gather(throttling, return_exceptions=True)
        if (pid := cluster.processes.get(node)) is not None:
            os.kill(pid, signal.SIGCONT)


async def _await_plan(
    cluster: LocalCluster, load: Load, what: str, before: Plan, without: NodeId, say: Say, began: float | None = None
) -> Disturbance:
    """Wait for a plan that does without a node, and see what the streams noticed."""
    began = began or time.monotonic()
    acted, plan = None, before
    while acted is None and time.monotonic() - began < ACT_S:
        await asyncio.sleep(POLL_S)
        plan = await _current(cluster, load.deployment)
        if plan.epoch > before.epoch and without not in plan.nodes:
            acted = time.monotonic()
    await asyncio.sleep(STEADY_S)
    now = time.monotonic()
    say("no plan without it" if acted is None else f"a plan without {without} after {acted - began:.1f} s")
    return Disturbance(
        what,
        plan.reason if acted is not None else "the plan stayed as it was",
        None if acted is None else acted - began,
        load.worst_s(began, now),
        load.median_s(began - STEADY_S, began),
        load.median_s(now - STEADY_S / 2, now),
    )


async def _current(cluster: LocalCluster, deployment: DeploymentName) -> Plan:
    status = await control.status(cluster.operator)
    [found] = [one for one in status.deployments if one.name == deployment]
    return _plan_of(found)


def _plan_of(found: DeploymentStatus) -> Plan:
    assert found.current is not None, "it was deployed and serves"
    return found.current


def prompts(streamed: Sequence[Streamed]) -> tuple[str, ...]:
    """Each prompt of the load, once."""
    return tuple(dict.fromkeys(stream.prompt for stream in streamed))

"""One soak: a cluster, a load that does not cease, faults that follow one another, and what is left in the end."""

import asyncio
import random
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx2
from nats.aio.client import Client as Nats

from benchmarks.faults.__main__ import BEFORE_S, connected
from benchmarks.faults.load import DEPLOYMENT, ENDS_S, INBOX, SILENCE_S, Asked, Load, Question, Wire, questions
from benchmarks.faults.scenario import Scenario
from benchmarks.faults.scenarios import SCENARIOS
from benchmarks.faults.scene import WHOLE_S, Ear, Scene
from benchmarks.faults.surroundings import Needs, SkippedError, Surroundings, surrounded
from benchmarks.faults.wires import why_not
from benchmarks.soak.mixed import HTTP_S, TENSORS, Mixed, layers, sums
from benchmarks.soak.samples import Sampler, Samples, of_process
from benchmarks.soak.verdict import Fault, Request
from bus.connection import connect
from bus.credentials import inbox_prefix
from bus.identity import ORCHESTRATOR, load_credentials, load_identity
from bus.succession import lives
from bus.together import CLIENT
from models.store import Store
from resplit import control
from resplit.client import Client
from resplit.cluster import LocalCluster
from resplit.server import NATS
from resplit.standing import Reader, trust_of
from resplit.trail import read_trail
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings
from schemas.errors import ResplitError

FAULTS = (
    "agent-killed", "ingress-killed", "agent-hung", "ingress-hung", "killed-loading", "leader-killed", "nats-killed",
    "moved", "drained", "slowed", "link-slow", "link-cut", "agent-cut-off", "ingress-cut-off", "bus-cut", "leader-hung",
    "memory-short", "file-rotten", "bytes-malformed",
)  # fmt: skip
"""Those of the matrix that one cluster can go through as often as one likes: a node that joins would stay, and what is
forged in the name of others lies in the trail, where whoever verifies it finds it."""
PACED = ("slowed", "link-slow")
"""What these promise of plans and of the pace they promise where nothing else changes, and here something does."""
KILLS = ("agent-killed", "ingress-killed", "killed-loading", "leader-killed", "nats-killed", "memory-short")
"""They are left out of the second half: a process that lives ten minutes shows no leak."""
ORCHESTRATORS = 2
GATEWAYS = f"{inbox_prefix('client', CLIENT)}.*"
"""The gateway logs in as the client does; its inboxes have no name of their own."""
STILL_S, QUIET_S = 3.0, 8.0
"""After a fault is over; and what then counts."""
REDEPLOYED_S = (15.0, 40.0)
SETTLE_S = 150.0
"""A slot whose Close was lost with its link is free after two minutes."""


@dataclass
class Told:
    """What a soak brought; times are those of `time.monotonic`."""

    began: float
    wired: bool
    samples: Samples
    accepted: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    quiet: list[tuple[float, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Promises that a fault found broken, in its words."""
    conflicts: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    """What was held before anybody asked."""
    after: dict[str, float] = field(default_factory=dict)
    settled_s: float = 0.0
    """From the last answer until nothing was under way."""
    owed: dict[str, int] = field(default_factory=dict)
    """Messages of the journal that are no fence, by life."""
    fences: int = 0
    ends: dict[str, list[str]] = field(default_factory=dict)
    """Of each request how the trail says it ended, as often as it does."""
    events: int = 0
    verified: int | None = None
    """The exit status of `resplit audit verify`."""
    verdict: str = ""
    ended: float = 0.0


async def soak(folder: Path, store: Store, seconds: float, seed: int, say: Callable[[str], None] = print) -> Told:
    """Run for about so long; raises what cannot be made good again."""
    asked = await asyncio.to_thread(questions, store)
    short = await asyncio.to_thread(sums, store)
    rows = await asyncio.to_thread(layers, store, folder)
    async with AsyncExitStack() as stack:
        wires: Literal["agents"] | None = "agents" if why_not() is None else None
        needs = Needs(orchestrators=ORCHESTRATORS, wires=wires, watched=True)
        around = await stack.enter_async_context(surrounded(needs, folder, store.root))
        cluster = around.cluster
        connection, replies, looking, leaver = [
            await connected(cluster, keys)
            for keys in (cluster.operator_keys, cluster.client_keys, cluster.operator_keys, cluster.client_keys)
        ]
        for one in (connection, replies, looking, leaver):
            stack.push_async_callback(one.close)
        ear = Ear(load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR))
        await ear.listen(connection)
        wire = Wire()
        for inboxes in (f"{INBOX}.>", GATEWAYS):
            await wire.listen(replies, inboxes)
        sampler = Sampler(cluster, looking)
        client = await stack.enter_async_context(
            Client(
                cluster.url,
                keys=cluster.client_keys,
                idle_timeout_s=HTTP_S,
                nats_options={"inbox_prefix": INBOX},
            )
        )
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=cluster.http_url, timeout=HTTP_S))
        draw = random.Random(seed)
        mixed = Mixed(client, leaver, http, short, rows, random.Random(seed + 1))
        told = Told(time.monotonic(), wires is not None, sampler.samples)
        running = _Soak(around, connection, ear, wire, client, mixed, sampler, asked, draw, told, say)
        await running.go_on(seconds)
        await running.look_back(looking)
        return told


@dataclass(eq=False)
class _Soak:
    around: Surroundings
    connection: Nats
    ear: Ear
    wire: Wire
    client: Client
    mixed: Mixed
    sampler: Sampler
    questions: Sequence[Question]
    draw: random.Random
    told: Told
    say: Callable[[str], None]

    @property
    def cluster(self) -> LocalCluster:
        return self.around.cluster

    async def go_on(self, seconds: float) -> None:
        """Deploy, look at what an idle cluster holds, then let fault follow fault; then look again."""
        scene = self._scene(Load(self.client, self.questions), 0)
        await scene.place(None)
        await self._deploy_tensors(2)
        await scene.whole()
        await asyncio.sleep(STILL_S)
        self.told.before = await self._held()
        until = time.monotonic() + seconds
        async with self.sampler.running():
            async with self.mixed.running(ENDS_S), self._redeployed():
                for index, scenario in enumerate(self._deck(until - seconds / 2)):
                    if time.monotonic() >= until:
                        break
                    await self._through(scenario, index)
            await scene.place(None)
            await scene.whole()
            await self._settled()
        self.told.after = await self._held()

    async def look_back(self, connection: Nats) -> None:
        """What the journal and the trail say once all is over."""
        told = self.told
        told.requests += self.mixed.asked
        told.accepted |= self.wire.accepted | self.mixed.accepted
        told.conflicts += self.wire.conflicts
        agent = NodeId(self.cluster.agents[0])
        journal = await connect(self.cluster.url, "soak", credentials=load_credentials(self.cluster.keys / agent))
        try:
            for deployment in (DEPLOYMENT, TENSORS):
                for life in await lives(journal, deployment):
                    fence = int(life.fenced_by is not None)
                    told.fences += fence
                    if life.messages > fence:
                        told.owed[life.life] = life.messages - fence
        finally:
            await journal.close()
        trust = trust_of(self.ear.identity.roster)
        reader = Reader(trust)
        ends = defaultdict(list)
        async for data in read_trail(connection.jetstream(), follow=False):
            event = reader.read(data).event
            told.events += 1
            if event.kind is AuditKind.REQUEST_ENDED and event.request is not None:
                ends[str(event.request)].append(str(event.fields.get("code") or "output"))
        told.ends = dict(ends)
        told.verified, told.verdict = await self._verified()
        told.ended = time.monotonic()

    def _deck(self, half: float) -> Iterator[Scenario]:
        """Each fault once in an order that is drawn, and again; from `half` on none that kills."""
        possible = [one for one in SCENARIOS if one.name in FAULTS and (self.told.wired or one.needs.wires is None)]
        while True:
            for one in self.draw.sample(possible, len(possible)):
                if one.name not in KILLS or time.monotonic() < half:
                    yield one

    async def _through(self, scenario: Scenario, index: int) -> None:
        """One fault under load, and a while of quiet when all is whole again."""
        options = {"inbox_prefix": INBOX}
        keys = self.cluster.client_keys
        async with Client(self.cluster.url, keys=keys, idle_timeout_s=SILENCE_S, nats_options=options) as client:
            load = Load(client, self.questions)
            scene = self._scene(load, index)
            async with load.running():
                await scene.place(None)
                await scene.whole()
                await load.flowing()
                await asyncio.sleep(self.draw.uniform(*BEFORE_S))
                await self._done_to(scene, scenario)
                await asyncio.sleep(STILL_S)
                begin = time.monotonic()
                await asyncio.sleep(QUIET_S)
                self.told.quiet.append((begin, time.monotonic()))
        self.told.requests += [_request(one) for one in load.asked]
        self.wire.forget([one.request_id for one in load.asked])
        self.wire.forget([one.request_id for one in self.mixed.asked if one.ended is not None])
        self.ear.heard.clear()
        self.ear.audit.clear()

    async def _done_to(self, scene: Scene, scenario: Scenario) -> None:
        at, broken = time.monotonic(), list[str]()
        try:
            seen = await scenario.act(scene)
            if scenario.name not in PACED:
                broken += [how for how in seen.broken if "says nothing" not in how]
            await scene.whole()
        except SkippedError as why:
            self.say(f"{scenario.name}: {why}")
            await scene.whole()
        except (TimeoutError, ResplitError) as error:
            broken.append(f"{type(error).__name__}: {error}")
            await self._mended(scene)
        over = time.monotonic()
        self.told.faults.append(Fault(scenario.name, at, over))
        self.told.broken += [f"{scenario.name}: {how}" for how in broken]
        minutes = (over - self.told.began) / 60
        self.say(f"{minutes:5.1f} min {scenario.name}: {over - at:.1f} s {'; '.join(broken)}")

    async def _mended(self, scene: Scene) -> None:
        """All processes there again, and all links; raises TimeoutError if it does not become whole."""
        for name in self.cluster.processes:
            await self.cluster.resume(name)
        for name in (NATS, *self.cluster.orchestrators, *self.cluster.agents):
            if name not in self.cluster.processes:
                await self.cluster.start(name)
        async with asyncio.timeout(2 * WHOLE_S):
            await scene.whole()

    def _scene(self, load: Load, index: int) -> Scene:
        return Scene(self.around, self.connection, self.ear, self.wire, load, self.draw, index)

    @asynccontextmanager
    async def _redeployed(self) -> AsyncIterator[None]:
        """Have the second deployment cut anew again and again while the block runs."""

        async def again() -> None:
            while True:
                await asyncio.sleep(self.draw.uniform(*REDEPLOYED_S))
                with suppress(ResplitError, TimeoutError):  # nobody leads just now, or a node is away
                    await self._deploy_tensors(self.draw.randint(1, 2))

        task = asyncio.create_task(again())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _deploy_tensors(self, stages: int) -> None:
        request = DeployRequest(name=TENSORS, model=TENSORS, settings=Settings(max_sequences=8), stages=stages)
        await control.deploy_and_wait(self.cluster.operator, request, WHOLE_S)

    async def _settled(self) -> None:
        """Wait until nothing is under way any more; it is found among what is left if that does not come."""
        began = time.monotonic()
        while time.monotonic() - began < SETTLE_S:
            with suppress(ResplitError):
                held = await self.sampler.held()
                if not any(held[name] for name in ("sequences", "requests that wait", "epochs that no plan names")):
                    break
            await asyncio.sleep(1.0)
        self.told.settled_s = time.monotonic() - began

    async def _held(self) -> dict[str, float]:
        found = {**await self.sampler.held(), **await self.sampler.connections()}
        return {
            **found,
            **{f"files of {name}": of_process(pid)["files"] for name, pid in self.cluster.processes.items()},
        }

    async def _verified(self) -> tuple[int, str]:
        """What `resplit audit verify` says of the whole trail."""
        at = ("--url", self.cluster.url, "--keys", str(self.cluster.operator_keys))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "resplit", "audit", "verify", *at, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
        lines = said.decode().splitlines()
        return process.returncode or 0, lines[-1] if lines else ""


def _request(one: Asked) -> Request:
    """A stream of the fault matrix."""
    count = len(one.ids)
    if tuple(one.ids) != one.question.expected[:count]:
        outcome = "wrong"
    elif one.error is not None:
        outcome = str(one.error.code)
    else:
        outcome = "output" if count == len(one.question.expected) else "ended early"
    return Request(one.request_id, "stream", one.began, one.ended, outcome)

"""The agent process: connects everything, verifies plans, and does what `agent.step` says."""

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import psutil
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext

from agent import step as core
from agent.blocktimes import BlockTimes
from agent.busroad import BusRoad
from agent.cloud import Clouds
from agent.compute import ComputeThread
from agent.config import AgentConfig, choose_provider
from agent.disk import Disk
from agent.fetching import Fetcher
from agent.gate import Gate
from agent.guard import RosterGuard
from agent.guides import Guides
from agent.ingress import Ingress
from agent.keys import BlockKeys
from agent.kv import KvPool
from agent.links import LinkServer
from agent.loader import LoadedPlan, Loader
from agent.measures import AgentMeasures
from agent.memory import Device
from agent.neighbours import Neighbours
from agent.peers import Peers
from agent.policy import check_allowed, check_block_count
from agent.publisher import CapacityPublisher
from agent.pulse import Life
from agent.stage import StageHost
from agent.stages import EXPIRE_EVERY_S, Stages, ToIngress
from agent.staging import Stager
from agent.survey import Survey
from bus.audit import AuditTrail
from bus.blobs import BlobServer
from bus.connection import MemberClient, connect
from bus.identity import Identity, load_credentials, load_identity
from bus.sealed_heartbeats import open_heartbeat, read_hosting
from bus.sole import sole
from bus.stopping import end, stoppable
from bus.streams import wait_for_streams
from models.store import Store
from models.text import Text
from models.unsealed import forget_folders
from profiler.device import DeviceMeter, Reading, device_memory, within_budget
from profiler.exposition import exposed
from profiler.kv import length_classes
from profiler.tracing import traced
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, Digest, NodeId, NodeName, home_of
from schemas.capacity import Capacity, Provider
from schemas.envelope import RECEIPT_TYPE, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.heartbeat import hosting_of
from schemas.manifest import Manifest
from schemas.plan import Plan, Receipt, ReceiptStatus, spans
from schemas.section import EventSection, SeenPlan

SWITCH_INTERVAL_S = 0.0002
"""The compute thread comes back from ONNX Runtime and wants the interpreter: by default the event loop may keep it
for 5 ms, which is half a token."""
RETRY_S = 1.0
CORRUPT = "a file was corrupt and was not used"
AUDITED = {
    ReceiptStatus.READY: AuditKind.PLAN_READY,
    ReceiptStatus.REFUSED: AuditKind.PLAN_REFUSED,
    ReceiptStatus.APPLIED: AuditKind.PLAN_APPLIED,
    ReceiptStatus.RETIRED: AuditKind.BLOCKS_FREED,
}

log = logging.getLogger(__name__)


async def run(config: AgentConfig) -> None:
    """Run one agent until cancelled. Raises `ResplitError` if it cannot start as it was told to."""
    if config.cores is not None:
        os.sched_setaffinity(0, config.cores)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    identity = load_identity(config.keys, config.node)
    with sole(identity.folder, config.node):
        life = Life(config.url)
        telling = asyncio.create_task(life.supervised.run())
        try:
            await _serve(config, identity, life)
        finally:
            await end([telling])


async def _serve(config: AgentConfig, identity: Identity, life: Life) -> None:
    store = Store(config.store)
    forget_folders()
    device, provider = await asyncio.to_thread(choose_provider, config.provider, config.thread_count)
    client = await connect(config.url, f"agent {config.node}", credentials=load_credentials(config.keys))
    agent = Agent(config, identity, store, client, device, provider, life.supervised.ready)
    life.begun(agent.compute, lambda: agent.status)
    try:
        with exposed(config.metrics, agent.measures.registry), traced("resplit-agent", config.node):
            await agent.run()
    finally:
        await agent.stop()


class Agent:
    """One edge node."""

    def __init__(
        self,
        config: AgentConfig,
        identity: Identity,
        store: Store,
        client: MemberClient,
        device: Device,
        provider: Provider,
        on_said: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_said` is called whenever a heartbeat was published."""
        self._on_said = on_said
        self._config = config
        self._identity = identity
        self._store = store
        self._client = client
        self._device = device
        self._meter = DeviceMeter(device, store.blobs_folder, config.thread_count)
        self._provider = provider
        self._state = core.State(config.node)
        self._boot = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self.compute = ComputeThread(self._loop)
        self.measures = AgentMeasures()
        self._files = BlobServer(client, store)
        self._peers = Peers(identity, self._link_changed)
        self._block_times = BlockTimes(config.node)
        guard = RosterGuard(identity, self._ingresses_of, lambda: self._audit)
        self._stages = Stages(
            config.node,
            self.compute,
            self._peers,
            self._to_ingress,
            self._open_host,
            guard,
            lambda node, sequence: self._neighbours.is_gone(node, sequence),  # noqa: PLW0108 - there are none yet
        )
        gate = Gate(lambda of, epoch: core.plan_of(self._state, of, epoch), self._ingresses_of, self._stages.route)
        self._links = LinkServer(identity, gate.arrived, self._suspect)
        self._bus = BusRoad(client, identity, gate.arrived, self._unreachable, self._peers.came_over_the_bus)
        self._peers.bus = self._bus
        self._neighbours = Neighbours(
            config.node,
            self._boot,
            time.monotonic,
            self._bus.probe,
            self._stages.ingress_lost,
            lambda node: self._peers.warm((node,)),
        )
        self._fetcher = Fetcher(client, store, self._files, self._corrupt)
        self._disk = Disk(config.node, store, self._fetcher, self._plans, lambda: self._audit, config.disk_bytes)
        self._keys = BlockKeys(identity)
        self._loader = Loader(
            config.node, store, self._fetcher, self._disk, self._keys, device, config.thread_count, self._memory_free
        )
        self._bare_bytes = psutil.Process().memory_info().rss
        """Before anything was loaded."""
        self._loaded: dict[tuple[DeploymentName, int], LoadedPlan] = {}
        self._loading: dict[tuple[DeploymentName, int], asyncio.Task[None]] = {}
        self._instructions: asyncio.Queue[core.Instruction] = asyncio.Queue()

    async def run(self) -> None:
        """Serve until cancelled."""
        js = await self._streams()
        memory = self._identity.folder / "trail.end"
        self._audit = AuditTrail(js, self._identity, boot=self._boot, memory=memory, home=self._identity.home)
        self._asks = Clouds(self._config.clouds, self._audit, time.monotonic, lambda: self._identity.roster.policy)
        self._ingress = Ingress(
            self._identity,
            self._boot,
            self._client,
            self._audit,
            self._stages.send,
            self._emptied,
            time.monotonic,
            self._neighbours.is_over,
            lambda: self._publisher.changed(),  # noqa: PLW0108 - there is none yet
            self._asks,
        )
        host, port = await self._links.start(self._config.listen)
        self._publisher = CapacityPublisher(
            self._client,
            self._identity,
            self._boot,
            provider=self._provider,
            threads=self._config.thread_count,
            tier=self._config.tier,
            price_per_hour=self._config.price_per_hour,
            clouds=tuple(sorted(self._config.clouds)),
            link=self._config.advertise or f"{host}:{port}",
            version=version("resplit"),
            read=self._read,
            stages=lambda: core.hosted(self._state, self._running),
            block_times=lambda: self._block_times.now(self._loader.block_times, self._plans()),
            slowdown=lambda: self._block_times.slowdown,
            links=self._peers.estimates,
            on_disk=self._fetcher.on_disk,
            lost_peers=lambda: self._neighbours.lost,
            stalled=lambda: self._ingress.stalled,
            service=lambda: self._ingress.service,
            frame_ms=lambda: self._stages.frame_ms,
            finished=lambda: self._ingress.finished,
            guidance=lambda: self._guides.guidance,
            ingresses=self._ingresses_of,
            on_said=self._said,
            on_published=self._on_said,
        )
        self._guides = Guides(
            self._client, self._identity, self._audit, self._plan_arrived, self._recheck, self._publisher.changed
        )
        await self._ingress.start()
        await self._bus.start()
        await self._client.subscribe(subjects.ALL_CAPACITY, cb=self._heartbeat_arrived)
        stager = Stager(
            self._identity,
            self._store,
            self._fetcher,
            self._disk,
            lambda: bool(self._loading),
            self._audit,
            self._publisher.changed,
        )
        await stager.listen(self._client)
        survey = Survey(self._identity, self._peers, lambda: bool(self._plans()), self._publisher.changed)
        async with asyncio.TaskGroup() as group:
            for job in (
                self._audit.run(),
                self._ingress.run(),
                self._publisher.run(),
                self._peers.ping(),
                survey.run(),
                stager.run(),
                self._guides.run(),
                self._act_forever(),
                self._expire_forever(),
            ):
                group.create_task(stoppable(job))

    def _said(self, capacity: Capacity) -> None:
        """A heartbeat is about to leave."""
        self._ingress.speaks(self._config.node, hosting_of(capacity))
        self.measures.said(capacity, self._audit.counts, self._client.troubles, self._ingress.journal_waits_s)

    @property
    def status(self) -> str:
        """What it does now, in one line."""
        if not hasattr(self, "_publisher"):
            return "waits for an orchestrator"
        hosted = core.hosted(self._state, self._running)
        held = [f"{one.deployment} ({one.state}, blocks {spans(one.blocks)})" for one in hosted]
        away = "" if self._client.is_connected else "; the NATS server is away"
        return f"{', '.join(held) or 'spare'}; {sum(one.sequences for one in hosted)} sequence(s){away}"

    async def stop(self) -> None:
        """Leave the bus and close the links."""
        for task in self._loading.values():
            task.cancel()
        if hasattr(self, "_ingress"):
            await self._ingress.stop()
            await self._asks.stop()
        await self._peers.stop()
        await self._links.stop()
        if hasattr(self, "_audit"):
            telling = asyncio.create_task(self._audit.run())
            await asyncio.sleep(0)  # it has begun, or it could not be cancelled cleanly
            await self._audit.drain(1.0)
            telling.cancel()
        with contextlib.suppress(Exception):  # leaving must not fail because the server left first
            await asyncio.wait_for(self._client.close(), 2.0)
        await asyncio.to_thread(self.compute.stop)

    def _recheck(self) -> None:
        """Others are members now."""
        self._links.recheck()
        self._peers.recheck()

    async def _streams(self) -> JetStreamContext:
        """The streams of its home, as soon as an orchestrator has made them."""
        said = False
        while True:
            try:
                return await wait_for_streams(self._client, self._identity.home)
            except (NatsError, TimeoutError, OSError) as error:
                if not said:
                    log.warning("an orchestrator has not made the streams yet; trying until one has: %r", error)
                    said = True
                await asyncio.sleep(RETRY_S)

    # Plans.

    def _plan_arrived(self, event: EventSection) -> None:
        self._keys.follow(event)
        self._step(core.PlanArrived(event))

    def _step(self, event: core.Event) -> None:
        self._state, instructions = core.step(self._state, event, time.monotonic())
        for instruction in instructions:
            self._instructions.put_nowait(instruction)

    async def _act_forever(self) -> None:
        while True:
            instruction = await self._instructions.get()
            try:
                await self._act(instruction)
            except Exception:  # one deployment's trouble must not stop the node from acting on the others
                log.exception("an instruction failed: %s", type(instruction).__name__)
            self._publisher.changed()

    async def _act(self, instruction: core.Instruction) -> None:
        match instruction:
            case core.Load(plan):
                self._loading[plan.deployment, plan.epoch] = asyncio.create_task(self._load(plan))
            case core.Follow(event):
                self._neighbours.declared(event.lost)
                for node in event.lost:
                    self._stages.ingress_lost(node)
                await self._ingress.follow(self._without_forbidden(event))
            case core.Serve(plan):
                if isinstance(plan, Plan):
                    manifest = self._store.manifest(plan.model)
                    await self._ingress.serve(plan, manifest, self._text(plan, manifest))
            case core.Drain(plan):
                self._ingress.drain(plan)
            case core.Free(plan):
                await self._free(plan)
            case core.Answer():
                self._answer(instruction)
            case core.Ignore(event, why):
                log.info("ignored a plan event of %s: %s", event.deployment, why)

    async def _load(self, plan: SeenPlan) -> None:
        try:
            await self._load_and_install(plan)
        except ResplitError as error:
            if error.code is ErrorCode.CORRUPT_FILE:
                self._audit.record(AuditKind.BLOB_CORRUPT, CORRUPT, error=error.message)
            self._step(core.LoadFailed(plan, f"{error.code.value}: {error.message}"))
        except Exception as error:  # a full disk, say: the orchestrator must hear of it, whatever it was
            log.exception("a plan could not be loaded: %s, epoch %d", plan.deployment, plan.epoch)
            self._step(core.LoadFailed(plan, f"{ErrorCode.STAGE_FAILED.value}: {type(error).__name__}: {error}"))
        else:
            self._step(core.Loaded(plan))
        finally:
            self._loading.pop((plan.deployment, plan.epoch), None)

    def _without_forbidden(self, event: EventSection) -> EventSection:
        """`event`, without a plan in force that is forbidden: whether or not this node has a part in that, none of its
        requests may run over it. Those that do so already, as the root forbade it, go on until it is replaced."""
        plan = event.current
        if plan is None or self._ingress.runs_over(plan):
            return event
        manifest = self._fetcher.known(plan.model)
        try:
            check_allowed(self._identity.roster, plan)
            if manifest is not None:
                check_block_count(plan, manifest)
        except ResplitError as error:
            log.warning("no request here runs over epoch %d of %s: %s", plan.epoch, plan.deployment, error.message)
            return event.model_copy(update={"current": None})
        return event

    async def _load_and_install(self, plan: SeenPlan) -> None:
        check_allowed(self._identity.roster, plan)
        loaded = await self._loader.load(plan)
        try:
            await self._stages.install(plan, loaded)
        except BaseException:  # cancelled, or no memory for the caches: nothing of the plan stays
            await self._stages.remove(plan)
            self._loader.unload(loaded, plan)
            raise
        self._loaded[plan.deployment, plan.epoch] = loaded
        if loaded.fetched_bytes:
            self._audit.record(
                AuditKind.BLOB_FETCHED,
                "the files of a plan were fetched",
                deployment=plan.deployment,
                epoch=plan.epoch,
                size_bytes=loaded.fetched_bytes,
            )

    def _corrupt(self, digest: Digest) -> None:
        record = partial(self._audit.record, AuditKind.BLOB_CORRUPT, CORRUPT, digest=digest)
        self._loop.call_soon_threadsafe(record)

    async def _free(self, plan: SeenPlan) -> None:
        key = (plan.deployment, plan.epoch)
        if (task := self._loading.pop(key, None)) is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._stages.remove(plan)
        if (loaded := self._loaded.pop(key, None)) is not None:
            self._loader.unload(loaded, plan)

    def _answer(self, answer: core.Answer) -> None:
        plan = answer.plan
        receipt = Receipt(
            node=self._identity.name,
            deployment=plan.deployment,
            epoch=plan.epoch,
            plan=plan.digest,
            status=answer.status,
            error=answer.error,
            elapsed_ms=round(1e3 * answer.elapsed_s, 3),
        )
        if (kind := AUDITED.get(answer.status)) is not None:
            message = f"this node answered {answer.status.value}"
            self._audit.record(
                kind,
                message,
                deployment=plan.deployment,
                epoch=plan.epoch,
                model=plan.model,
                blocks=spans(plan.blocks_on(self._identity.name)),
                elapsed_ms=receipt.elapsed_ms,
                error=answer.error,
            )
        data = seal(receipt, RECEIPT_TYPE, self._identity.name, self._identity.key)
        self._guides.answer(home_of(plan.deployment), data)

    def _text(self, plan: Plan, manifest: Manifest) -> Text | None:
        if manifest.text is None or not any(route.source == self._identity.name for route in plan.routes):
            return None
        return Text(manifest.text, self._store.path(manifest.text.tokenizer.digest))

    def _emptied(self, deployment: DeploymentName, epoch: int) -> None:
        self._step(core.Emptied(deployment, epoch))

    def _ingresses_of(self, deployment: DeploymentName) -> tuple[NodeName, ...]:
        return core.ingresses(self._state, deployment)

    def _open_host(self, plan: SeenPlan) -> StageHost:
        pool, invariant = KvPool(self._device, length_classes(plan.settings)), plan.settings.batch_invariant
        return StageHost(self._config.node, plan.model, pool, self._block_times.note, batch_invariant=invariant)

    # Peers.

    async def _heartbeat_arrived(self, msg: Msg) -> None:
        try:
            heartbeat = open_heartbeat(msg.data, self._identity)
        except ResplitError as error:
            log.warning("dropped a heartbeat: %s", error.message)
            return
        if heartbeat.node == self._identity.name or not self._neighbours.heard(heartbeat):
            return
        self._peers.learn(heartbeat)
        try:
            hosting = read_hosting(heartbeat, self._identity)
        except ResplitError as error:
            log.warning("of a heartbeat only that it came was taken: %s", error.message)
            return
        if hosting is not None:
            self._ingress.heard(NodeId(heartbeat.node), hosting)

    def _link_changed(self, node: NodeId, up: bool) -> None:
        self._audit.record(
            AuditKind.LINK_CHANGED, "a direct link came up" if up else "a direct link was lost", peer=node, up=up
        )
        if not up:
            self._suspect(node)
            self._ingress.link_lost(node)

    def _suspect(self, node: NodeId) -> None:
        """A link with a peer ended, whoever had opened it: find out whether its process did."""
        if any(node in plan.nodes for plan in self._plans()):
            self._neighbours.look_for(node)

    def _unreachable(self, node: NodeId) -> None:
        if self._neighbours.lose(node):
            self._publisher.changed()
        self._stages.peer_lost(node)
        self._stages.ingress_lost(node)
        self._ingress.node_lost(node)

    def _to_ingress(self, frame: ToIngress) -> None:
        self._ingress.take(frame)

    # What the node reports.

    def _plans(self) -> list[SeenPlan]:
        return core.plans_of(self._state)

    def _running(self, plan: SeenPlan) -> int:
        return self._ingress.driven(plan) + self._stages.passing(plan)

    def _read(self) -> Reading:
        used, promised = self._memory_used()
        found = self._meter.read(
            time.monotonic(), self._config.memory_bytes, used, promised, at_rest=self._block_times.at_rest
        )
        free_bytes, models_bytes = self._disk.room()
        return replace(found, disk_free_bytes=free_bytes, disk_models_bytes=models_bytes)

    def _memory_free(self) -> int:
        return within_budget(device_memory(self._device), self._config.memory_bytes, *self._memory_used()).free_bytes

    def _memory_used(self) -> tuple[int, int]:
        """Bytes that this process takes, and that it will take once all caches are written to; a GPU's are taken when
        they are made."""
        used = psutil.Process().memory_info().rss
        promised = self._bare_bytes + self._loader.held_bytes - used
        return used, max(0, promised) if self._device == "cpu" else 0

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            self._stages.expire(self._neighbours.numbers)

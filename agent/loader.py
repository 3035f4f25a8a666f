"""From a plan to engines: fetch by hash, verify, open sessions, warm, time. What two plans share is loaded once."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import onnxruntime as ort

from agent.alone import alone_on_machine
from agent.disk import Disk
from agent.engine import Engine, Segment
from agent.fetching import Fetcher, block_files, tokenizer_file
from agent.keys import BlockKeys
from agent.memory import Device, release_memory
from agent.policy import check_block_count
from agent.probe import Probe, probe
from models.lora import read_inputs
from models.merge import merge
from models.opening import opened
from models.session import open_session
from models.store import Store
from profiler.kv import kv_tokens
from profiler.memory import kv_memory_bytes, session_memory_bytes
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Block, Manifest, ModelKind
from schemas.section import SeenPlan

BETWEEN_ENDS_S = 0.02
"""Between the ends of two sessions: a few times what one of them takes."""

log = logging.getLogger(__name__)

RangeKey = tuple[Digest, int, int]
"""Blocks of a model, the first and the last."""
SessionKey = tuple[Digest, ...]
"""Of blocks by their graphs, which name their weights: those of several models may be the same."""
Kind = tuple[str, str]
"""Role and weight bytes, to three digits: blocks that agree in them run the same kernels on the same shapes. What a
graph holds besides makes layers that are alike differ by a few hundred bytes."""


@dataclass(frozen=True)
class LoadedPlan:
    """This node's stages of a plan, as engines by (epoch, route, stage)."""

    manifest: Manifest
    engines: dict[tuple[int, int, int], Engine]
    fetched_bytes: int


@dataclass(frozen=True)
class _Held:
    """What a plan has here."""

    model: Digest
    blocks: tuple[Block, ...]
    settings: Settings


class Loader:
    """Loads and unloads the blocks of plans; a block that two plans have here is one session, also where it is of two
    models that share it."""

    def __init__(
        self,
        node: NodeId,
        store: Store,
        files: Fetcher,
        disk: Disk,
        keys: BlockKeys,
        device: Device,
        threads: int,
        memory_free: Callable[[], int],
    ) -> None:
        """`memory_free` in bytes."""
        self._node = node
        self._store = store
        self._files = files
        self._disk = disk
        self._keys = keys
        self._device = device
        self._threads = threads
        self._memory_free = memory_free
        self._engines: dict[RangeKey, tuple[Engine, int]] = {}
        self._sessions: dict[SessionKey, tuple[ort.InferenceSession, int]] = {}
        self._held: dict[tuple[Digest, int], _Held] = {}
        """By family and epoch; plans of one family share caches."""
        self._kinds: dict[Digest, dict[Kind, Probe]] = {}
        self._one_at_a_time = asyncio.Lock()
        self.block_times: dict[tuple[Digest, int], BlockTime] = {}
        """Of every block of the models that are loaded: measured when it was, or when one of its kind was."""

    async def load(self, plan: SeenPlan) -> LoadedPlan:
        """Everything `plan` gives this node. Raises `ResplitError`, and then nothing of it stays loaded."""
        manifest, fetched = await self._fetch(plan)
        if manifest.pipeline is not None:
            return LoadedPlan(manifest, {}, fetched)  # nothing of it is computed: its services are asked
        wanted = {
            (plan.epoch, *place): (plan.model, stage.first, stage.last)
            for place, stage in plan.placed.items()
            if stage.node == self._node
        }
        held: dict[RangeKey, Engine] = {}
        try:
            async with self._one_at_a_time:  # two would both find the memory free, and disturb each other's probes
                self._refuse_what_does_not_fit(plan, manifest)
                for key in wanted.values():
                    if key not in held:
                        held[key] = await self._hold(manifest, key)
                here = tuple(manifest.blocks[i] for i in plan.blocks_on(self._node))
                self._held[plan.family, plan.epoch] = _Held(plan.model, here, plan.settings)
        except BaseException as error:
            self._let_go(held)
            if isinstance(error, ResplitError) or not isinstance(error, Exception):
                raise
            message = f"{manifest.name}: loading failed: {type(error).__name__}: {error}"
            raise ResplitError(ErrorCode.STAGE_FAILED, message) from error
        return LoadedPlan(manifest, {place: held[key] for place, key in wanted.items()}, fetched)

    def unload(self, loaded: LoadedPlan, plan: SeenPlan) -> None:
        """Give back what `load` returned; sessions that no other plan uses are closed."""
        self._held.pop((plan.family, plan.epoch), None)
        self._let_go({(plan.model, e.blocks[0].index, e.blocks[-1].index): e for e in loaded.engines.values()})

    @property
    def held_bytes(self) -> int:
        """What is loaded takes once every cache of it is written to."""
        sessions, own = dict[Digest, int](), dict[tuple[Digest, int], int]()
        for (family, _), held in tuple(self._held.items()):  # heartbeats are made in a thread
            for block in held.blocks:
                sessions[block.graph.digest] = session_memory_bytes(block)
                own[held.model, block.index] = block.adapter_bytes
                own[family, block.index] = kv_memory_bytes(block, held.settings)
        return sum(sessions.values()) + sum(own.values())

    async def _fetch(self, plan: SeenPlan) -> tuple[Manifest, int]:
        manifest, fetched = await self._files.manifest(plan.model)
        check_block_count(plan, manifest)
        refs = block_files(manifest, plan.blocks_on(self._node))
        if any(route.source == self._node for route in plan.routes):
            refs += tokenizer_file(manifest)
        # What is loaded already is not read again; what is to be read may have rotted since it was last.
        loaded = self._loaded_graphs()
        unread = [i for i in plan.blocks_on(self._node) if manifest.blocks[i].graph.digest not in loaded]
        missing = await self._files.missing(refs, {ref.digest for ref in block_files(manifest, unread)})
        await self._disk.room_for_plan(missing)
        fetched += await self._files.bring(missing)
        await self._files.offer([plan.model, *(ref.digest for ref in refs)])
        return manifest, fetched

    def _refuse_what_does_not_fit(self, plan: SeenPlan, manifest: Manifest) -> None:
        # Blocks that another plan of this deployment has here already are shared with it, weights and caches; sessions
        # also with other models that have the same blocks.
        blocks = plan.blocks_on(self._node)
        loaded = self._loaded_graphs()
        alike = [held for (family, _), held in self._held.items() if family == plan.family]
        cached = {block.index for held in alike for block in held.blocks}
        tokens = kv_tokens(plan.settings) if manifest.kind is ModelKind.DECODER else 0
        needed = sum(manifest.blocks[i].session_bytes for i in blocks if manifest.blocks[i].graph.digest not in loaded)
        needed += sum(manifest.blocks[i].adapter_bytes for i in blocks)
        needed += sum(manifest.blocks[i].kv_bytes_per_token * tokens for i in blocks if i not in cached)
        free = self._memory_free()
        if needed > free:
            short = f"{needed} bytes here, {free} are free: {needed - free} short"
            message = f"{manifest.name}: {len(blocks)} blocks need {short}"
            raise ResplitError(ErrorCode.MODEL_TOO_LARGE, message)

    def _loaded_graphs(self) -> set[Digest]:
        return {graph for key in self._sessions for graph in key}

    async def _hold(self, manifest: Manifest, key: RangeKey) -> Engine:
        if key in self._engines:
            engine, users = self._engines[key]
        else:
            engine, users = await self._build(manifest, key), 0
        self._engines[key] = (engine, users + 1)
        return engine

    def _let_go(self, ranges: Iterable[RangeKey]) -> None:
        closed: list[ort.InferenceSession] = []
        for key in ranges:
            engine, users = self._engines.pop(key)
            if users > 1:
                self._engines[key] = (engine, users - 1)
                continue
            for segment in engine.segments:
                closed += self._close(_session_key(segment.blocks))
        loaded = {model for model, _, _ in self._engines}
        self.block_times = {key: time for key, time in self.block_times.items() if key[0] in loaded}
        # Not before whoever called has forgotten the engines: the last one to hold a session pays for its end.
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.run_in_executor(None, _end, closed))

    def _close(self, key: SessionKey) -> list[ort.InferenceSession]:
        """Give a session back; it is returned if nobody else uses it."""
        session, users = self._sessions.pop(key)
        if users > 1:
            self._sessions[key] = (session, users - 1)
            return []
        return [session]

    async def _build(self, manifest: Manifest, key: RangeKey) -> Engine:
        model, first, last = key
        blocks = manifest.blocks[first : last + 1]
        # Blocks with caches are a session each, so that a cut can move without a block being loaded twice or
        # stopping; a model without them has nothing in flight that outlives a call, and runs faster in one.
        decoder = manifest.kind is ModelKind.DECODER
        groups = [[block] for block in blocks] if decoder else [list(blocks)]
        measuring = decoder and not {_kind(block) for block in blocks} <= self._kinds.get(model, {}).keys()
        segments: list[Segment] = []
        try:
            async with alone_on_machine() if measuring else contextlib.nullcontext():
                for group in groups:
                    segments.append(await self._segment(manifest, model, group))
                engine = Engine(manifest, segments, self._device)
                if decoder:
                    await self._measure(model, engine)
        except BaseException:
            for segment in segments:
                self._close(_session_key(segment.blocks))
            raise
        return engine

    async def _segment(self, manifest: Manifest, model: Digest, group: Sequence[Block]) -> Segment:
        key = _session_key(group)
        session, users = self._sessions.get(key, (None, 0))
        if session is None or any(block.adapter is not None for block in group):
            segment = await asyncio.to_thread(self._open, manifest, model, group, session)
        else:
            segment = Segment(tuple(group), session)
        self._sessions[key] = (segment.session, users + 1)
        return segment

    def _open(
        self, manifest: Manifest, model: Digest, blocks: Sequence[Block], session: ort.InferenceSession | None
    ) -> Segment:
        """Blocks with what is fed to them, over a session of the same graph if there is one."""
        with opened(self._store, manifest, blocks, partial(self._keys.key, model)) as (graphs, folder):
            if session is None:
                graph = graphs[0] if len(graphs) == 1 else merge(graphs)
                session = open_session(graph, folder, self._device, self._threads)
            own = [read_inputs((folder / b.adapter.digest).read_bytes()) for b in blocks if b.adapter is not None]
        device = self._device
        fed = {name: ort.OrtValue.ortvalue_from_numpy(v, device, 0) for one in own for name, v in one.items()}
        return Segment(tuple(blocks), session, fed)

    async def _measure(self, model: Digest, engine: Engine) -> None:
        """Time the blocks and find their kernels' habits, once for blocks of a kind: a cut that moves under load must
        not be held up, nor measured beside the sequences that run."""
        known = self._kinds.setdefault(model, {})
        for segment in engine.segments:
            [block] = segment.blocks
            if _kind(block) not in known:
                known[_kind(block)] = await asyncio.to_thread(probe, Engine(engine.manifest, [segment], self._device))
            measured = known[_kind(block)]
            engine.rows_min = max(engine.rows_min, measured.rows_min)
            self.block_times.setdefault((model, block.index), _time_of(model, block, measured))


def _session_key(blocks: Sequence[Block]) -> SessionKey:
    return tuple(block.graph.digest for block in blocks)


def _end(sessions: list[ort.InferenceSession]) -> None:
    """End sessions one by one, with pauses: each takes milliseconds in which nothing else of this process gets the
    interpreter, and sequences are running."""
    while sessions:
        sessions.pop()
        time.sleep(BETWEEN_ENDS_S)
    release_memory()


def _time_of(model: Digest, block: Block, measured: Probe) -> BlockTime:
    return BlockTime(
        model=model,
        block=block.index,
        decode_ms=1e3 * measured.decode_s,
        decode_ms_per_row=1e3 * measured.decode_s_per_row,
        decode_ms_per_context_token=1e3 * measured.decode_s_per_context_token,
        rows_min=measured.rows_min,
        prefill_ms=1e3 * measured.prefill_s,
        prefill_ms_per_token=1e3 * measured.prefill_s_per_token,
    )


def _kind(block: Block) -> Kind:
    return block.role, f"{block.weight_bytes:.2e}"

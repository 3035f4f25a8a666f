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
from agent.engine import Engine, Segment
from agent.fetching import Fetcher, block_files, tokenizer_file
from agent.keys import BlockKeys
from agent.memory import Device, release_memory
from agent.policy import check_block_count
from agent.probe import Probe, probe
from models.merge import merge
from models.opening import opened
from models.session import open_session
from models.store import Store
from profiler.kv import kv_tokens
from profiler.memory import kv_memory_bytes, weight_memory_bytes
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
    """Loads and unloads the blocks of plans; a block that two plans have here is one session."""

    def __init__(
        self,
        node: NodeId,
        store: Store,
        files: Fetcher,
        keys: BlockKeys,
        device: Device,
        threads: int,
        memory_free: Callable[[], int],
    ) -> None:
        """`memory_free` in bytes."""
        self._node = node
        self._store = store
        self._files = files
        self._keys = keys
        self._device = device
        self._threads = threads
        self._memory_free = memory_free
        self._engines: dict[RangeKey, tuple[Engine, int]] = {}
        self._sessions: dict[RangeKey, tuple[ort.InferenceSession, int]] = {}
        self._held: dict[tuple[Digest, int], _Held] = {}
        """By family and epoch; plans of one family share caches, those of one model weights."""
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
        weights, caches = dict[tuple[Digest, int], int](), dict[tuple[Digest, int], int]()
        for (family, _), held in tuple(self._held.items()):  # heartbeats are made in a thread
            for block in held.blocks:
                weights[held.model, block.index] = weight_memory_bytes(block)
                caches[family, block.index] = kv_memory_bytes(block, held.settings)
        return sum(weights.values()) + sum(caches.values())

    async def _fetch(self, plan: SeenPlan) -> tuple[Manifest, int]:
        manifest, fetched = await self._files.manifest(plan.model)
        check_block_count(plan, manifest)
        refs = block_files(manifest, plan.blocks_on(self._node))
        if any(route.source == self._node for route in plan.routes):
            refs += tokenizer_file(manifest)
        missing = await self._files.missing(refs)
        fetched += await self._files.bring(missing)
        await self._files.offer([plan.model, *(ref.digest for ref in refs)])
        return manifest, fetched

    def _refuse_what_does_not_fit(self, plan: SeenPlan, manifest: Manifest) -> None:
        # Blocks that another plan of this deployment has here already are shared with it, weights and caches.
        blocks = plan.blocks_on(self._node)
        loaded = {i for model, first, last in self._sessions if model == plan.model for i in range(first, last + 1)}
        alike = [held for (family, _), held in self._held.items() if family == plan.family]
        cached = {block.index for held in alike for block in held.blocks}
        tokens = kv_tokens(plan.settings) if manifest.kind is ModelKind.DECODER else 0
        needed = sum(manifest.blocks[i].weight_bytes for i in blocks if i not in loaded)
        needed += sum(manifest.blocks[i].kv_bytes_per_token * tokens for i in blocks if i not in cached)
        free = self._memory_free()
        if needed > free:
            short = f"{needed} bytes here, {free} are free: {needed - free} short"
            message = f"{manifest.name}: {len(blocks)} blocks need {short}"
            raise ResplitError(ErrorCode.MODEL_TOO_LARGE, message)

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
                closed += self._close((key[0], segment.blocks[0].index, segment.blocks[-1].index))
        loaded = {model for model, _, _ in self._sessions}
        self.block_times = {key: time for key, time in self.block_times.items() if key[0] in loaded}
        # Not before whoever called has forgotten the engines: the last one to hold a session pays for its end.
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.run_in_executor(None, _end, closed))

    def _close(self, key: RangeKey) -> list[ort.InferenceSession]:
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
                    segments.append(Segment(tuple(group), await self._session(manifest, model, group)))
                engine = Engine(manifest, segments, self._device)
                if decoder:
                    await self._measure(model, engine)
        except BaseException:
            for segment in segments:
                self._close((model, segment.blocks[0].index, segment.blocks[-1].index))
            raise
        return engine

    async def _session(self, manifest: Manifest, model: Digest, group: Sequence[Block]) -> ort.InferenceSession:
        key = (model, group[0].index, group[-1].index)
        session, users = self._sessions.get(key, (None, 0))
        if session is None:
            session = await asyncio.to_thread(self._open, manifest, model, group)
        self._sessions[key] = (session, users + 1)
        return session

    def _open(self, manifest: Manifest, model: Digest, blocks: Sequence[Block]) -> ort.InferenceSession:
        with opened(self._store, manifest, blocks, partial(self._keys.key, model)) as (graphs, folder):
            graph = graphs[0] if len(graphs) == 1 else merge(graphs)
            return open_session(graph, folder, self._device, self._threads)

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

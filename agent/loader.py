"""From a plan to engines: fetch by hash, verify, open sessions, choose how many blocks share one, warm, time."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnxruntime as ort
from nats.aio.client import Client

from agent.engine import Engine, Segment
from agent.memory import Device
from agent.probe import PREFILL_TOKENS, Probe, probe
from bus.blobs import BlobServer, fetch, size_of
from models.merge import merge
from models.session import open_session, verified_graph, verify_once
from models.store import Store
from profiler.kv import kv_tokens
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest, ModelKind
from schemas.plan import Plan

FETCHES_MAX = 4
"""Files fetched at once; each already asks for several pieces at once."""
FUSE_BELOW = 0.97
"""Blocks share a session when that takes less than this share of the time they take one by one."""
PROBE_BLOCKS = 4

log = logging.getLogger(__name__)

RangeKey = tuple[Digest, int, int]


@dataclass(frozen=True)
class LoadedPlan:
    """This node's stages of a plan, as engines by (epoch, route, stage)."""

    manifest: Manifest
    engines: dict[tuple[int, int, int], Engine]
    fetched_bytes: int


class Loader:
    """Loads and unloads the blocks of plans; equal stages of two plans are one engine."""

    def __init__(
        self,
        node: NodeId,
        client: Client,
        store: Store,
        server: BlobServer,
        device: Device,
        threads: int,
        memory_free: Callable[[], int],
        on_corrupt: Callable[[Digest], None],
    ) -> None:
        """`memory_free` in bytes; `on_corrupt` hears, from any thread, of damaged files before they are replaced."""
        self._node = node
        self._client = client
        self._store = store
        self._server = server
        self._device = device
        self._threads = threads
        self._memory_free = memory_free
        self._on_corrupt = on_corrupt
        self._engines: dict[RangeKey, tuple[Engine, int]] = {}
        self._fuse: dict[Digest, bool] = {}
        self._one_at_a_time = asyncio.Lock()
        self.block_times: dict[tuple[Digest, int], BlockTime] = {}

    async def load(self, plan: Plan) -> LoadedPlan:
        """Everything `plan` gives this node. Raises `ResplitError`, and then nothing of it stays loaded."""
        manifest, fetched = await self._fetch(plan)
        wanted = {
            (plan.epoch, route.index, i): (plan.model, stage.first, stage.last)
            for route in plan.routes
            for i, stage in enumerate(route.stages)
            if stage.node == self._node
        }
        held: dict[RangeKey, Engine] = {}
        try:
            async with self._one_at_a_time:  # two would both find the memory free, and disturb each other's probes
                self._refuse_what_does_not_fit(plan, manifest, set(wanted.values()))
                for key in wanted.values():
                    if key not in held:
                        held[key] = await self._hold(manifest, key)
        except BaseException as error:
            self._let_go(held)
            if isinstance(error, ResplitError) or not isinstance(error, Exception):
                raise
            message = f"{manifest.name}: loading failed: {type(error).__name__}: {error}"
            raise ResplitError(ErrorCode.STAGE_FAILED, message) from error
        return LoadedPlan(manifest, {place: held[key] for place, key in wanted.items()}, fetched)

    def unload(self, loaded: LoadedPlan, plan: Plan) -> None:
        """Give back what `load` returned; engines no other plan holds are dropped."""
        ranges = {(plan.model, e.blocks[0].index, e.blocks[-1].index): e for e in loaded.engines.values()}
        self._let_go(ranges)

    async def _fetch(self, plan: Plan) -> tuple[Manifest, int]:
        fetched = 0
        if not self._store.has(plan.model):
            size = await size_of(self._client, plan.model)
            await fetch(self._client, self._store, plan.model, size)
            fetched += size
        manifest = self._store.manifest(plan.model)
        blocks = [manifest.blocks[i] for i in plan.blocks_on(self._node)]
        files = {ref.digest: ref.size_bytes for block in blocks for ref in (block.graph, *block.weights)}
        if manifest.text is not None and any(route.source == self._node for route in plan.routes):
            files[manifest.text.tokenizer.digest] = manifest.text.tokenizer.size_bytes
        refs = [BlobRef(digest=digest, size_bytes=size) for digest, size in files.items()]
        unsound = await asyncio.to_thread(lambda: [ref for ref in refs if not self._is_sound(ref)])
        missing = {ref.digest: ref.size_bytes for ref in unsound}
        gate = asyncio.Semaphore(FETCHES_MAX)

        async def one(digest: Digest, size: int) -> None:
            async with gate:
                await fetch(self._client, self._store, digest, size)

        try:
            async with asyncio.TaskGroup() as group:
                for digest, size in missing.items():
                    group.create_task(one(digest, size))
        except* ResplitError as errors:
            raise errors.exceptions[0] from None
        await self._server.offer([plan.model, *files])
        return manifest, fetched + sum(missing.values())

    def _is_sound(self, ref: BlobRef) -> bool:
        """Whether the file is here and whole; one that is damaged is reported and removed, to be fetched anew."""
        if not self._store.has(ref.digest):
            return False
        try:
            verify_once(self._store, ref)
        except ResplitError as error:
            if error.code is not ErrorCode.CORRUPT_FILE:
                raise
            self._on_corrupt(ref.digest)
            self._store.path(ref.digest).unlink(missing_ok=True)
            return False
        return True

    def _refuse_what_does_not_fit(self, plan: Plan, manifest: Manifest, ranges: set[RangeKey]) -> None:
        # An engine that another plan holds is shared; caches never are, since each plan hands out its own slots.
        new = [key for key in ranges if key not in self._engines]
        weights = sum(manifest.blocks[i].weight_bytes for _, first, last in new for i in range(first, last + 1))
        wanted = {i for _, first, last in ranges for i in range(first, last + 1)}
        tokens = kv_tokens(plan.settings) if manifest.kind is ModelKind.DECODER else 0
        needed = weights + sum(manifest.blocks[i].kv_bytes_per_token * tokens for i in wanted)
        free = self._memory_free()
        if needed > free:
            short = f"{needed} bytes here, {free} are free: {needed - free} short"
            message = f"{manifest.name}: {len(wanted)} blocks need {short}"
            raise ResplitError(ErrorCode.MODEL_TOO_LARGE, message)

    async def _hold(self, manifest: Manifest, key: RangeKey) -> Engine:
        if key in self._engines:
            engine, users = self._engines[key]
        else:
            engine, users = await asyncio.to_thread(self._build, manifest, key), 0
        self._engines[key] = (engine, users + 1)
        return engine

    def _let_go(self, ranges: dict[RangeKey, Engine]) -> None:
        for key in ranges:
            engine, users = self._engines.pop(key)
            if users > 1:
                self._engines[key] = (engine, users - 1)

    def _build(self, manifest: Manifest, key: RangeKey) -> Engine:
        model, first, last = key
        blocks = manifest.blocks[first : last + 1]
        layers = [block for block in blocks if block.role == "layer"]
        if model not in self._fuse and len(layers) > 1 and manifest.kind is ModelKind.DECODER:
            self._fuse[model] = self._fusing_pays(manifest, layers[:PROBE_BLOCKS])
        engine = self._engine(manifest, group_blocks(blocks, fuse=self._fuse.get(model, True)))
        if manifest.kind is ModelKind.DECODER:
            measured = probe(engine)
            engine.rows_min = measured.rows_min
            self._share_out(model, blocks, measured)
        return engine

    def _engine(self, manifest: Manifest, groups: Sequence[Sequence[Block]]) -> Engine:
        return Engine(manifest, [Segment(tuple(group), self._open(group)) for group in groups], self._device)

    def _open(self, blocks: Sequence[Block]) -> ort.InferenceSession:
        graphs = [verified_graph(self._store, block) for block in blocks]
        graph = graphs[0] if len(graphs) == 1 else merge(graphs)
        return open_session(graph, self._store.blobs_folder, self._device, self._threads)

    def _fusing_pays(self, manifest: Manifest, layers: Sequence[Block]) -> bool:
        apart = probe(self._engine(manifest, [[block] for block in layers])).decode_s
        together = probe(self._engine(manifest, [layers])).decode_s
        log.info("%d blocks, one step: %.3f ms apart, %.3f ms in one session", len(layers), apart * 1e3, together * 1e3)
        return together < FUSE_BELOW * apart

    def _share_out(self, model: Digest, blocks: Sequence[Block], measured: Probe) -> None:
        """What a stage took, per block: a step by the weights streamed, a chunk by the arithmetic."""
        weights, flops = sum(b.weight_bytes for b in blocks), sum(b.flops_per_token for b in blocks)
        for block in blocks:
            self.block_times[model, block.index] = BlockTime(
                model=model,
                block=block.index,
                decode_ms=1e3 * measured.decode_s * block.weight_bytes / max(weights, 1),
                prefill_ms_per_token=1e3 * measured.prefill_s / PREFILL_TOKENS * block.flops_per_token / max(flops, 1),
            )


def group_blocks(blocks: Sequence[Block], *, fuse: bool) -> list[list[Block]]:
    """Which blocks share a session. A decoder's head stays alone: prefill chunks before the last skip it."""
    if not fuse:
        return [[block] for block in blocks]
    body = [block for block in blocks if not (block.role == "head" and block.kv == ())]
    return [group for group in (list(body), list(blocks[len(body) :])) if group]

"""What an engine does on this machine: how long a step takes, and from how many rows its results stop changing.

ONNX Runtime may use another kernel for one row than for many (on x86 without AVX-512, 4-bit weights do), and
then a sequence's tokens would depend on who shares its batch. Measured, and mended by running a lone row in
company: `rows_min` is the number of rows from which a row's result no longer depends on the others.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np

from agent.engine import Engine
from agent.kv import KvPool
from schemas.capacity import REFERENCE_CONTEXT_TOKENS
from schemas.tensor import Array

CHUNK_TOKENS = (8, 64)
"""Two lengths of a chunk: what it costs however short it is, and what each token adds."""
STEPS = 12
STEPS_MORE = 6
"""For what a step costs more, of more sequences or behind a longer context."""
ROWS = 8
"""Rows of the largest batch that is compared and timed."""
LONG_CONTEXT_TOKENS = 640
CONTEXTS_APART_TOKENS = 128
"""Closer than this, two contexts do not tell what a token of context costs."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Probe:
    """Times in seconds. A step of `rows_min` sequences behind `REFERENCE_CONTEXT_TOKENS` takes `decode_s`."""

    decode_s: float
    decode_s_per_row: float
    """What each sequence beyond `rows_min` adds."""
    decode_s_per_context_token: float
    """What each further token in the cache of one sequence adds."""
    prefill_s: float
    """Of a chunk, however short it is."""
    prefill_s_per_token: float
    rows_min: int


def probe(engine: Engine) -> Probe:
    """Run an engine of a decoder on caches of its own: some steps and short chunks."""
    longest = engine.manifest.text.context_length if engine.manifest.text is not None else LONG_CONTEXT_TOKENS
    room = max(1, longest - STEPS)
    near = min(REFERENCE_CONTEXT_TOKENS if engine.in_place else CHUNK_TOKENS[-1], room)
    far = min(LONG_CONTEXT_TOKENS, room) if engine.in_place else near
    tokens = max(far, min(CHUNK_TOKENS[-1], room)) + STEPS
    pool = KvPool(engine.device, ((tokens, ROWS),))
    for block in engine.blocks:
        pool.add_block(block)
    for sequence in range(ROWS):
        pool.open(sequence, tokens)
    try:
        return _probe(_Bench(engine, pool, tokens), near, far)
    finally:
        engine.forget(pool)


def _probe(bench: "_Bench", near: int, far: int) -> Probe:
    engine = bench.engine
    rows_min = _rows_min(bench) if engine.in_place else 1
    bench.run(range(rows_min), 0, _input(engine, rows_min, 1))
    short, long = (min(length, bench.tokens - STEPS) for length in CHUNK_TOKENS)
    short_s, long_s = bench.chunk_s(short), bench.chunk_s(long)
    per_token = max(0.0, long_s - short_s) / max(1, long - short)
    per_token = min(per_token, long_s / long)  # a short chunk that was held up must not make the long one's rest free
    decode, least = bench.step_s(rows_min, near, STEPS)
    # Without caches in place every sequence is a call of its own.
    per_row, per_context = 1.0, 0.0
    if engine.in_place:
        _, many = bench.step_s(ROWS, near, STEPS_MORE)
        # Never more than a call of its own would cost: what looks like it was held up by others.
        per_row = min(max(0.0, many / least - 1) / (ROWS - rows_min), 1 / rows_min)
        if far - near >= CONTEXTS_APART_TOKENS and any(block.kv for block in engine.blocks):
            _, behind = bench.step_s(rows_min, far, STEPS_MORE)
            per_context = max(0.0, behind / least - 1) / (far - near) / rows_min
    return Probe(decode, per_row * decode, per_context * decode, long_s - per_token * long, per_token, rows_min)


@dataclass(frozen=True, slots=True)
class _Bench:
    """An engine and caches that nobody else uses."""

    engine: Engine
    pool: KvPool
    tokens: int

    def run(self, rows: range, position: int, x: Array) -> Array:
        if self.engine.in_place:
            y = self.engine.run_rows(self.pool, self.tokens, rows, [position] * len(rows), x, head=True)
        else:
            y = self.engine.run_appending(self.pool, rows.start, position, x, head=True)
        assert y is not None, "with its head every engine yields something"
        return y

    def timed(self, rows: range, position: int, x: Array) -> float:
        started = time.perf_counter()
        self.run(rows, position, x)
        return time.perf_counter() - started

    def chunk_s(self, length: int) -> float:
        """A chunk at the beginning of a prompt: the better of two, as one may be held up."""
        x = _input(self.engine, 1, length)
        self.run(range(1), 0, x)
        return min(self.timed(range(1), 0, x) for _ in range(2))

    def step_s(self, rows: int, context: int, steps: int) -> tuple[float, float]:
        """The first quartile of some steps, and the least. Other nodes load at the same time, often on this machine,
        and what they take is no slowdown that lasts; and only the least tell two kinds of step apart. The first step
        also prepares the call and does not count."""
        x = _input(self.engine, rows, 1)
        self.run(range(rows), context, x)
        found = sorted(self.timed(range(rows), context + i, x) for i in range(1, steps))
        return found[len(found) // 4], max(found[0], 1e-9)


def _rows_min(bench: _Bench) -> int:
    engine = bench.engine
    x = _input(engine, ROWS, 1)
    together = bench.run(range(ROWS), 0, x)
    for rows in (1, 2):
        apart = [bench.run(range(i, i + rows), 0, x[i : i + rows]) for i in range(0, ROWS, rows)]
        if np.array_equal(np.concatenate(apart), together):
            return rows
    names = f"blocks {engine.blocks[0].index} to {engine.blocks[-1].index} of {engine.manifest.name}"
    log.warning("results depend on the batch, whatever its size: %s", names)
    return 1


def _input(engine: Engine, rows: int, length: int) -> Array:
    """Ids, or activations of ordinary size; the same ones every time."""
    rng = np.random.default_rng(0)
    boundary = engine.blocks[0].input
    if boundary is None:
        assert engine.manifest.text is not None
        return rng.integers(0, engine.manifest.text.vocab_size, (rows, length), np.int64)
    shape = (rows, length, *(int(size) for size in boundary.shape[2:]))
    return rng.standard_normal(shape).astype(boundary.dtype)

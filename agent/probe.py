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
from schemas.tensor import Array

PREFILL_TOKENS = 32
STEPS = 12
ROWS = 8
"""Rows of the largest batch that is compared."""
SLOT_TOKENS = PREFILL_TOKENS + STEPS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Probe:
    """Times in seconds: one step of one sequence (median), one prefill chunk of `PREFILL_TOKENS`."""

    decode_s: float
    prefill_s: float
    rows_min: int


def probe(engine: Engine) -> Probe:
    """Run an engine of a decoder on caches of its own; a few steps and one short chunk."""
    pool = KvPool(engine.device, ((SLOT_TOKENS, ROWS),))
    for block in engine.blocks:
        pool.add_block(block)
    for sequence in range(ROWS):
        pool.open(sequence, SLOT_TOKENS)
    try:
        rows_min = _rows_min(engine, pool) if engine.in_place else 1
        _run(engine, pool, range(rows_min), 0, _input(engine, rows_min, 1))
        chunk = _input(engine, 1, PREFILL_TOKENS)
        _run(engine, pool, range(1), 0, chunk)
        prefill = _timed(engine, pool, range(1), 0, chunk)
        step = _input(engine, rows_min, 1)
        steps = sorted(_timed(engine, pool, range(rows_min), PREFILL_TOKENS + i, step) for i in range(STEPS))
    finally:
        engine.forget(pool)
    return Probe(steps[STEPS // 2], prefill, rows_min)


def _rows_min(engine: Engine, pool: KvPool) -> int:
    x = _input(engine, ROWS, 1)
    together = _run(engine, pool, range(ROWS), 0, x)
    for rows in (1, 2):
        apart = [_run(engine, pool, range(i, i + rows), 0, x[i : i + rows]) for i in range(0, ROWS, rows)]
        if np.array_equal(np.concatenate(apart), together):
            return rows
    names = f"blocks {engine.blocks[0].index} to {engine.blocks[-1].index} of {engine.manifest.name}"
    log.warning("results depend on the batch, whatever its size: %s", names)
    return 1


def _run(engine: Engine, pool: KvPool, rows: range, position: int, x: Array) -> Array:
    if engine.in_place:
        y = engine.run_rows(pool, SLOT_TOKENS, rows, [position] * len(rows), x, head=True)
    else:
        y = engine.run_appending(pool, rows.start, position, x, head=True)
    assert y is not None, "with its head every engine yields something"
    return y


def _timed(engine: Engine, pool: KvPool, rows: range, position: int, x: Array) -> float:
    started = time.perf_counter()
    _run(engine, pool, rows, position, x)
    return time.perf_counter() - started


def _input(engine: Engine, rows: int, length: int) -> Array:
    """Ids, or activations of ordinary size; the same ones every time."""
    rng = np.random.default_rng(0)
    boundary = engine.blocks[0].input
    if boundary is None:
        assert engine.manifest.text is not None
        return rng.integers(0, engine.manifest.text.vocab_size, (rows, length), np.int64)
    shape = (rows, length, *(int(size) for size in boundary.shape[2:]))
    return rng.standard_normal(shape).astype(boundary.dtype)

"""PURE: what the blocks of a model take on a node (mathematics.md A1). Times in milliseconds.

A block's time is the one its node measured; before there is one, a roofline over the node's calibration. A decode step
grows with the sequences that share it and with the tokens behind them, a chunk with its length; the head runs for
the last chunk alone. The times of a model on a node are one value of arrays, for they are scaled and added up often.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from profiler.sizes import Sizes
from schemas.base import Digest
from schemas.capacity import MS_MAX, REFERENCE_CONTEXT_TOKENS, BlockTime, Provider
from schemas.deployment import DEFAULT_CHUNK_TOKENS

OVERHEAD_MS = 0.02
"""Per block and call: entering ONNX Runtime and binding its buffers, measured as up to 8 % of a step."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DECODE, ROW, CONTEXT, PREFILL, TOKEN = range(5)
"""The rows of `ModelTimes.ms`: `decode_ms`, `decode_ms_per_row`, `decode_ms_per_context_token`, `prefill_ms` and
`prefill_ms_per_token` of a `BlockTime`."""


@dataclass(frozen=True, eq=False)
class StageTimes:
    """What consecutive blocks of a model take on one node, added up."""

    decode_ms: float
    row_ms: float
    base_ms: float
    """`row_ms` of each block times its own `rows_min`: up to there a further sequence costs nothing."""
    context_ms: float
    prefill_ms: float
    token_ms: float
    head_prefill_ms: float
    head_token_ms: float
    """The two above are without the head, whose times these are."""
    rows_min: int
    model: "ModelTimes"
    part: slice
    """Its blocks there."""

    def step_ms(self, rows: float, context_tokens: float = REFERENCE_CONTEXT_TOKENS) -> float:
        """One decode step of `rows` sequences, each behind so many tokens."""
        rows = max(rows, 1.0, self.rows_min)  # a lone sequence runs in company
        beyond = rows * (context_tokens - REFERENCE_CONTEXT_TOKENS)
        if beyond < 0 and self.context_ms > 0:
            # What a shorter cache saves is measured too, and no block takes less than no time.
            ms, rows_min = self.model.ms[:, self.part], self.model.rows_min[self.part]
            each = ms[DECODE] + ms[ROW] * (rows - rows_min) + ms[CONTEXT] * beyond
            return float(np.maximum(each, 0.0).sum())
        return self.decode_ms + (self.row_ms * rows - self.base_ms) + self.context_ms * beyond

    def prompt_ms(self, tokens: int, chunks: int, last: int) -> float:
        """A whole prompt. A head of its own runs for the one token that is wanted (`agent.engine`)."""
        body_ms = chunks * self.prefill_ms + tokens * self.token_ms
        return body_ms + self.head_prefill_ms + last * self.head_token_ms


@dataclass(frozen=True, eq=False)
class ModelTimes:
    """Times of blocks of one model on one node. Equal where all of them are."""

    blocks: tuple[int, ...]
    """Each once, ascending."""
    ms: Floats
    """[5, K]: a column for each block. `ROW` is NaN where nobody measured it."""
    rows_min: Integers
    """[K]: sequences up to which a step costs the same."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ModelTimes)
            and self.blocks == other.blocks
            and np.array_equal(self.ms, other.ms, equal_nan=True)
            and np.array_equal(self.rows_min, other.rows_min)
        )

    def __hash__(self) -> int:
        return hash((self.blocks, self.ms.tobytes(), self.rows_min.tobytes()))

    @property
    def decode_ms(self) -> Floats:
        found: Floats = self.ms[DECODE]
        return found

    def slower(self, factor: float) -> "ModelTimes":
        """`factor` times as long, in every term."""
        return self if factor == 1.0 else replace(self, ms=self.ms * factor)

    def stage(self, first: int, last: int, heads: Iterable[int] = ()) -> StageTimes:
        """Blocks `first` to `last`, both included, of times that are known for every block of the model."""
        part = slice(first, last + 1)
        decode_ms, row_ms, context_ms, prefill_ms, token_ms = self.ms[:, part].sum(axis=1).tolist()
        rows_min: list[int] = self.rows_min[part].tolist()
        most = max(rows_min)
        base_ms = row_ms * most if min(rows_min) == most else float(self.ms[ROW, part] @ self.rows_min[part])
        head_prefill_ms = head_token_ms = 0.0
        for head in heads:
            if first <= head <= last:
                head_prefill_ms += float(self.ms[PREFILL, head])
                head_token_ms += float(self.ms[TOKEN, head])
        return StageTimes(
            decode_ms,
            row_ms,
            base_ms,
            context_ms,
            prefill_ms - head_prefill_ms,
            token_ms - head_token_ms,
            head_prefill_ms,
            head_token_ms,
            most,
            self,
            part,
        )


Times = Mapping[Digest, ModelTimes]
"""What one node measured of every model that it ran."""


def times_of(block_times: Iterable[BlockTime]) -> dict[Digest, ModelTimes]:
    """What a node measured, model by model; of two times of one block the later counts."""
    by_model: dict[Digest, dict[int, BlockTime]] = {}
    for time in block_times:
        by_model.setdefault(time.model, {})[time.block] = time
    return {model: _arrays(known) for model, known in by_model.items()}


def filled(known: ModelTimes | None, guess: ModelTimes) -> ModelTimes:
    """`guess`, which is of every block of a model, with what is known in its place. A slope nobody measured is 0."""
    columns = (
        [] if known is None else [column for column, block in enumerate(known.blocks) if block < len(guess.blocks)]
    )
    if known is None or not columns:
        return guess
    if len(columns) == len(guess.blocks):
        ms, rows_min = known.ms[:, columns], known.rows_min[columns]
    else:
        blocks = [known.blocks[column] for column in columns]
        ms, rows_min = guess.ms.copy(), guess.rows_min.copy()
        ms[:, blocks], rows_min[blocks] = known.ms[:, columns], known.rows_min[columns]
    return ModelTimes(guess.blocks, np.where(np.isnan(ms), 0.0, ms), rows_min)


def roofline(provider: Provider, sizes: Sizes) -> ModelTimes:
    """What a node's calibration promises for blocks that it never ran: `max(FLOP/F, bytes/BW) + overhead`
    (mathematics.md A1)."""
    # A node may say of itself that it is as slow as it likes: half of what any time can be leaves room for the rest.
    with np.errstate(over="ignore"):
        compute_ms = np.minimum(1e3 * sizes.flops / provider.flops_per_s, MS_MAX / 2)
        stream_ms = np.minimum(1e3 * sizes.streamed_bytes / provider.bytes_per_s, MS_MAX / 2)
    chunk = DEFAULT_CHUNK_TOKENS
    ms = np.zeros((5, sizes.blocks))
    ms[DECODE] = np.maximum(compute_ms, stream_ms) + OVERHEAD_MS
    ms[ROW] = compute_ms
    ms[TOKEN] = np.maximum(compute_ms, stream_ms / chunk) + OVERHEAD_MS / chunk
    return ModelTimes(tuple(range(sizes.blocks)), ms, np.ones(sizes.blocks, np.int64))


def _arrays(known: Mapping[int, BlockTime]) -> ModelTimes:
    blocks = tuple(sorted(known))
    columns = [
        (
            time.decode_ms,
            np.nan if time.decode_ms_per_row is None else time.decode_ms_per_row,
            time.decode_ms_per_context_token,
            time.prefill_ms,
            time.prefill_ms_per_token,
        )
        for time in map(known.__getitem__, blocks)
    ]
    return ModelTimes(blocks, np.array(columns).T, np.array([known[block].rows_min for block in blocks], np.int64))

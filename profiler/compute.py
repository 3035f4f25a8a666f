"""PURE: what a block takes on a node (mathematics.md A1). Times in milliseconds.

A block's time is the one its node measured; before there is one, a roofline over the node's calibration. A decode step
grows with the sequences that share it and with the tokens behind them, a chunk with its length; the head runs for
the last chunk alone.
"""

from collections.abc import Sequence

from schemas.base import Digest
from schemas.capacity import MS_MAX, REFERENCE_CONTEXT_TOKENS, BlockTime, Capacity
from schemas.deployment import DEFAULT_CHUNK_TOKENS
from schemas.manifest import Block, Manifest

OVERHEAD_MS = 0.02
"""Per block and call: entering ONNX Runtime and binding its buffers, measured as up to 8 % of a step."""


def block_time(capacity: Capacity, manifest: Manifest, digest: Digest, block: int) -> BlockTime:
    """tP and tD of one block on one node: measured, else `max(FLOP/F, bytes/BW) + overhead` (mathematics.md A1)."""
    measured = measured_time(capacity, digest, block)
    if measured is not None:
        return measured
    return roofline(capacity, manifest, digest, block)


def measured_time(capacity: Capacity, digest: Digest, block: int) -> BlockTime | None:
    times = (time for time in capacity.block_times if time.model == digest and time.block == block)
    return next(times, None)


def roofline(capacity: Capacity, manifest: Manifest, digest: Digest, block: int) -> BlockTime:
    """What the node's calibration promises for a block that it never ran."""
    what = manifest.blocks[block]
    # A node may say of itself that it is as slow as it likes: half of what any time can be leaves room for the rest.
    compute_ms = min(1e3 * what.flops_per_token / capacity.provider.flops_per_s, MS_MAX / 2)
    stream_ms = min(1e3 * _streamed_bytes(what) / capacity.provider.bytes_per_s, MS_MAX / 2)
    chunk = DEFAULT_CHUNK_TOKENS
    return BlockTime(
        model=digest,
        block=block,
        decode_ms=max(compute_ms, stream_ms) + OVERHEAD_MS,
        decode_ms_per_row=compute_ms,
        prefill_ms_per_token=max(compute_ms, stream_ms / chunk) + OVERHEAD_MS / chunk,
    )


def prompt_ms(time: BlockTime, block: Block, tokens: int, chunks: int, last: int) -> float:
    """A whole prompt through one block. A head of its own runs for the one token that is wanted (`agent.engine`)."""
    if block.role == "head":
        return time.prefill_ms + last * time.prefill_ms_per_token
    return chunks * time.prefill_ms + tokens * time.prefill_ms_per_token


def step_ms(times: Sequence[BlockTime], rows: float, context_tokens: float = REFERENCE_CONTEXT_TOKENS) -> float:
    """One decode step of `rows` sequences through blocks of one stage, each behind so many tokens."""
    rows = max(rows, 1.0, *(time.rows_min for time in times))  # a lone sequence runs in company
    total = 0.0
    for time in times:
        more = rows - time.rows_min
        attention = time.decode_ms_per_context_token * rows * (context_tokens - REFERENCE_CONTEXT_TOKENS)
        total += max(0.0, time.decode_ms + (time.decode_ms_per_row or 0.0) * more + attention)
    return total


def _streamed_bytes(block: Block) -> int:
    # A block without multiplications is a table that is looked up: it reads a row, not the table.
    return block.weight_bytes if block.flops_per_token else 0

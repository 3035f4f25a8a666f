"""Blocks whose calls take virtual time and compute nothing: they stand where ONNX Runtime's sessions do.

Everything around them is what runs in production: `agent.stage.StageHost`, its hand-over, slots and batches.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

from agent.kv import KvPool
from schemas.capacity import REFERENCE_CONTEXT_TOKENS, BlockTime
from schemas.frame import SequenceId
from schemas.manifest import Block
from schemas.tensor import Array
from simulator.kernel import Kernel

VOCABULARY = 7
"""Tokens that a head chooses from."""
CACHED = np.zeros(1, np.uint8)


class Clockwork:
    """How long a node has been at the call that runs now; its clock is that far ahead of the world's."""

    def __init__(self, kernel: Kernel, factor: Callable[[], float]) -> None:
        """`factor` says how many times longer than undisturbed a call takes that begins now."""
        self._kernel = kernel
        self.factor = factor
        self.spent_s = 0.0

    def now_us(self) -> int:
        return round(1e6 * (self._kernel.now + self.spent_s))

    def spend(self, ms: float) -> None:
        self.spent_s += ms * self.factor() / 1e3

    def take(self) -> float:
        """What was spent since this was last asked, in seconds."""
        spent, self.spent_s = self.spent_s, 0.0
        return spent


class StageCost:
    """What a call of several blocks takes, as `profiler.compute` sums it up (mathematics.md A1): a stage is asked for
    every frame, and most of its blocks are alike."""

    def __init__(self, times: Sequence[BlockTime]) -> None:
        alike = Counter(
            (t.decode_ms, t.decode_ms_per_row or 0.0, t.decode_ms_per_context_token, t.rows_min) for t in times
        )
        self._steps = [(many, *terms) for terms, many in alike.items()]
        self._rows_min = max(t.rows_min for t in times)
        self._chunk_ms = sum(t.prefill_ms for t in times)
        self._token_ms = sum(t.prefill_ms_per_token for t in times)
        self._context_ms = sum(t.decode_ms_per_context_token for t in times)

    def step_ms(self, rows: int, context_tokens: float) -> float:
        """One decode step of `rows` sequences, each behind so many tokens on average."""
        rows = max(rows, self._rows_min)
        behind, total = rows * (context_tokens - REFERENCE_CONTEXT_TOKENS), 0.0
        for many, first, per_row, per_token, rows_min in self._steps:
            total += many * max(0.0, first + per_row * (rows - rows_min) + per_token * behind)
        return total

    def chunk_ms(self, tokens: int, context_tokens: int) -> float:
        """One chunk of a prompt behind so many tokens."""
        return self._chunk_ms + tokens * self._token_ms + context_tokens * self._context_ms


class SimEngine:
    """Consecutive blocks on one node."""

    in_place = True
    rows_min = 1

    def __init__(self, blocks: Sequence[Block], times: Sequence[BlockTime], last: int, clock: Clockwork) -> None:
        """`times` are true ones; `last` is the model's last block."""
        self.blocks = tuple(blocks)
        self._clock = clock
        self.is_last = blocks[-1].index == last
        self.ends_in_head = blocks[-1].role == "head" and len(blocks) > 1
        self._cost = StageCost(times)
        self._body_cost = StageCost(times[:-1]) if self.ends_in_head else self._cost
        self._only_head = blocks[-1].role == "head" and len(blocks) == 1

    def run_rows(
        self, pool: KvPool, tokens: int, rows: range, positions: Sequence[int], x: Array, *, head: bool
    ) -> Array | None:
        """`x`: [B, S, ...]; what a stage would hand on, in shape [B, S, 1], or a row of logits for each token."""
        count, length = x.shape[:2]
        if self._only_head and not head:
            return None
        cost = self._cost if head else self._body_cost
        if length == 1:
            self._clock.spend(cost.step_ms(count, sum(positions) / len(positions)))
        else:
            self._clock.spend(cost.chunk_ms(length, positions[0]))
        if not self.is_last:
            return _hidden(count, length)
        if not head:
            return None
        if length == 1:
            return _LOGITS[[token_at(position) for position in positions]][:, None]
        return _LOGITS[np.remainder(np.arange(positions[0], positions[0] + length), VOCABULARY)][None]

    def run_appending(self, pool: KvPool, sequence: SequenceId, position: int, x: Array, *, head: bool) -> Array | None:
        raise NotImplementedError("caches are in place here")

    def run_tensors(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        raise NotImplementedError("only decoders are simulated")

    def forget(self, pool: KvPool) -> None:
        """Nothing was prepared."""


class SimPool(KvPool):
    """Slots as in production; caches that have a size and no content."""

    def __init__(self, classes: tuple[tuple[int, int], ...]) -> None:
        super().__init__("cpu", classes)

    def add_block(self, block: Block) -> None:
        self._users[block.index] = self._users.get(block.index, 0) + 1
        self._shapes[block.index] = (2 if block.kv else 0, block.kv_bytes_per_token)

    def read(self, block: int, sequence: SequenceId, start: int, stop: int) -> list[Array]:
        if block not in self._users or sequence not in self:
            raise KeyError(sequence)
        tensors, size = self._shapes[block]
        return [np.broadcast_to(CACHED, (1, stop - start, size // 2)) for _ in range(tensors)]

    def write(self, block: int, sequence: SequenceId, start: int, arrays: Sequence[Array]) -> None:
        if block not in self._users or sequence not in self:
            raise KeyError(sequence)

    def _fill_hole(self, move: object) -> None:
        """There is nothing to copy."""


@cache
def _hidden(rows: int, length: int) -> Array:
    return np.zeros((rows, length, 1), np.float32)


def token_at(position: int) -> int:
    """What the head chooses behind the token at an absolute position: a sequence that lost its place says it wrong."""
    return position % VOCABULARY


_LOGITS = np.eye(VOCABULARY, dtype=np.float32)

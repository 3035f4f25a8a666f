"""One deployment's stages on this node: frames in, frames out, on the compute thread.

Every sequence's progress is kept per stage, so that a hop is idempotent on (sequence, step): the step a
stage last ran may be run again and yields the same bytes; anything older was answered long ago and is
dropped; anything newer means a step was lost on the way, which the ingress is told.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agent.batching import contiguous_runs
from agent.engine import Engine
from agent.kv import KvPool
from agent.sampling import choose
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Activation, Failure, Frame, Item, Result, Sampling, SequenceId, StageTime, Token, on_stage
from schemas.tensor import Array

X = "x"
"""The name under which a decoder's ids and activations travel."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A frame and how long it waited for the compute thread, in microseconds."""

    frame: Activation
    waited_us: int


@dataclass(slots=True)
class _Progress:
    """Tokens of one sequence that one stage has run, and where its last step began."""

    tokens: int
    last: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of a decode frame and its input, [1, 1, ...]."""

    item: Item
    x: Array


class StageHost:
    """Runs frames of one deployment through whichever engine their epoch, route and stage name."""

    def __init__(
        self,
        pool: KvPool,
        *,
        batch_invariant: bool = True,
        now_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._pool = pool
        self._batch_invariant = batch_invariant
        self._now_us = now_us
        self._engines: dict[tuple[int, int, int], Engine] = {}
        self._progress: dict[tuple[SequenceId, int], _Progress] = {}
        self._sampling: dict[SequenceId, Sampling] = {}
        self._last_seen_us: dict[SequenceId, int] = {}

    def install(self, engines: Mapping[tuple[int, int, int], Engine]) -> None:
        """Serve these (epoch, route, stage) too; their blocks get caches in the pool."""
        for key, engine in engines.items():
            if key in self._engines:
                continue
            for block in engine.blocks:
                self._pool.add_block(block)
            self._engines[key] = engine

    def remove(self, epoch: int) -> None:
        """Stop serving an epoch and free the caches that only it used."""
        for key in [key for key in self._engines if key[0] == epoch]:
            engine = self._engines.pop(key)
            engine.forget(self._pool)
            for block in engine.blocks:
                self._pool.drop_block(block)

    def engine_key(self, frame: Activation) -> Hashable:
        """Equal for frames that one call may serve: same engine, same stage number."""
        return (id(self), id(self._engines.get((frame.epoch, frame.route, frame.stage))), frame.stage)

    @property
    def sequences(self) -> int:
        return len(self._pool.sequences)

    def close(self, sequences: Sequence[SequenceId]) -> None:
        """Free everything kept for these sequences."""
        for sequence in sequences:
            self._pool.close(sequence)
            self._sampling.pop(sequence, None)
            self._last_seen_us.pop(sequence, None)
            for key in [key for key in self._progress if key[0] == sequence]:
                del self._progress[key]

    def idle(self, limit_us: int) -> tuple[SequenceId, ...]:
        """Sequences that nobody drove for `limit_us`: their ingress is gone."""
        before = self._now_us() - limit_us
        return tuple(sequence for sequence, seen in self._last_seen_us.items() if seen < before)

    def run(self, batch: Sequence[Queued]) -> list[Frame]:
        """Run frames of one engine that were batched together; their successors, in the same order.

        Never raises: what goes wrong becomes a `Failure` for the sequences it concerns.
        """
        first = batch[0].frame
        try:
            engine = self._engines.get((first.epoch, first.route, first.stage))
            if engine is None:
                message = f"epoch {first.epoch}, route {first.route}, stage {first.stage} is not served here"
                raise ResplitError(ErrorCode.STALE_EPOCH, message)
            started = self._now_us()
            failed: list[Frame] = []
            ran: list[tuple[Queued, dict[str, Array]]]
            match first.kind:
                case "decode":
                    ran = self._decode(engine, batch, failed)
                case "prefill":
                    ran = self._prefill(engine, batch[0])
                case "tensor":
                    ran = [(batch[0], engine.run_tensors(first.tensors))]
            spent = self._now_us() - started
            return failed + [self._successor(engine, queued, tensors, spent) for queued, tensors in ran]
        except ResplitError as error:
            return [_failure(queued.frame, error) for queued in batch]
        except Exception as error:  # ONNX Runtime raises many types; none may end the agent.
            message = f"stage {first.stage} failed: {type(error).__name__}: {error}"
            return [_failure(queued.frame, ResplitError(ErrorCode.STAGE_FAILED, message)) for queued in batch]

    def _prefill(self, engine: Engine, queued: Queued) -> list[tuple[Queued, dict[str, Array]]]:
        frame = queued.frame
        [item] = frame.items
        progress = self._progress.get((item.sequence, frame.stage))
        if progress is None and item.position == 0:
            progress = self._progress[item.sequence, frame.stage] = _Progress(0, 0)
        if not self._is_due(progress, item):
            return []
        assert progress is not None
        slot = self._pool.open(item.sequence, item.capacity)
        self._last_seen_us[item.sequence] = self._now_us()
        if item.position + item.count > slot.tokens:
            raise _beyond(item, slot.tokens)
        if item.sampling is not None:
            self._sampling[item.sequence] = item.sampling
        x = _input(frame)
        if engine.in_place:
            rows = range(slot.row, slot.row + 1)
            y = engine.run_rows(self._pool, slot.tokens, rows, [item.position], x, head=item.wants_token)
        else:
            y = engine.run_appending(self._pool, item.sequence, item.position, x, head=item.wants_token)
        self._advance(progress, item)
        return [(queued, {} if y is None else {X: y})]

    def _decode(
        self, engine: Engine, batch: Sequence[Queued], failed: list[Frame]
    ) -> list[tuple[Queued, dict[str, Array]]]:
        """Each frame reduced to the rows that are due, with their results; missing steps go to `failed`."""
        reduced: list[tuple[Queued, list[_Row]]] = []
        # A repeated step may wait beside its successor, which proves that the first run of it was answered.
        newest: dict[SequenceId, int] = {}
        for queued in batch:
            for item in queued.frame.items:
                newest[item.sequence] = max(item.position, newest.get(item.sequence, 0))
        for arrived in batch:
            queued, frame, x, rows = arrived, arrived.frame, _input(arrived.frame), []
            for i, item in enumerate(frame.items):
                try:
                    due = self._is_due(self._progress.get((item.sequence, frame.stage)), item)
                    if due and item.position == newest[item.sequence]:
                        rows.append(_Row(item, x[i : i + 1]))
                except ResplitError as error:
                    failed.append(_failure(frame, error, (item.sequence,)))
            if len(rows) < len(frame.items):
                queued = Queued(replace(frame, items=tuple(row.item for row in rows)), queued.waited_us)
            if rows:
                reduced.append((queued, rows))
        wanted = [row for _, rows in reduced for row in rows]
        stage = batch[0].frame.stage
        results = self._run_slices(engine, wanted, stage) if engine.in_place else self._run_singly(engine, wanted)
        for row in wanted:
            self._advance(self._progress[row.item.sequence, stage], row.item)
        return [(q, {X: _stack([results[row.item.sequence] for row in rows])}) for q, rows in reduced]

    def _run_slices(self, engine: Engine, due: Sequence[_Row], stage: int) -> dict[SequenceId, Array]:
        """Decode steps over contiguous slices of rows; rows in between are run along, harmlessly.

        Such a row writes at the position after its last token, which its own next step overwrites.
        """
        results: dict[SequenceId, Array] = {}
        wanted: dict[int, dict[int, _Row]] = {}
        for row in due:
            slot = self._pool.slot(row.item.sequence)
            wanted.setdefault(slot.tokens, {})[slot.row] = row
        for tokens, by_row in wanted.items():
            for run in contiguous_runs(sorted(by_row), engine.rows_min if self._batch_invariant else 1):
                xs, positions = [], []
                for r in run:
                    if r in by_row:
                        xs.append(by_row[r].x)
                        positions.append(by_row[r].item.position)
                        continue
                    neighbour = self._pool.sequence_at(tokens, r)
                    progress = None if neighbour is None else self._progress.get((neighbour, stage))
                    xs.append(np.zeros_like(next(iter(by_row.values())).x))
                    positions.append(min(progress.tokens, tokens - 1) if progress is not None else 0)
                y = engine.run_rows(self._pool, tokens, run, positions, _stack(xs), head=True)
                assert y is not None, "with its head every engine yields something"
                for r, out in zip(run, y, strict=True):
                    if r in by_row:
                        results[by_row[r].item.sequence] = out[None]
        return results

    def _run_singly(self, engine: Engine, due: Sequence[_Row]) -> dict[SequenceId, Array]:
        results = {}
        for row in due:
            y = engine.run_appending(self._pool, row.item.sequence, row.item.position, row.x, head=True)
            assert y is not None, "with its head every engine yields something"
            results[row.item.sequence] = y
        return results

    def _is_due(self, progress: _Progress | None, item: Item) -> bool:
        """True to run it (again), False if it is older than the last step; raises if a step is missing."""
        if progress is None or item.position > progress.tokens:
            reached = 0 if progress is None else progress.tokens
            message = f"position {item.position} came when {reached} tokens had been run: a step was lost"
            raise ResplitError(ErrorCode.STAGE_FAILED, message)
        if item.sequence in self._pool and item.position + item.count > self._pool.slot(item.sequence).tokens:
            raise _beyond(item, self._pool.slot(item.sequence).tokens)
        return item.position >= progress.last

    def _advance(self, progress: _Progress, item: Item) -> None:
        progress.last = item.position
        progress.tokens = item.position + item.count
        self._last_seen_us[item.sequence] = self._now_us()

    def _successor(self, engine: Engine, queued: Queued, tensors: dict[str, Array], spent_us: int) -> Frame:
        frame = queued.frame
        spent = StageTime(frame.stage, spent_us, queued.waited_us)
        if not engine.is_last:
            return on_stage(frame, frame.stage + 1, tensors, spent)
        tokens: list[Token] = []
        done: list[tuple[SequenceId, int]] = []
        outputs: dict[str, Array] = {}
        if frame.kind == "tensor":
            outputs = tensors
            done = [(item.sequence, item.step) for item in frame.items]
        else:
            for row, item in enumerate(frame.items):
                if not item.wants_token:
                    done.append((item.sequence, item.step))
                    continue
                choice = choose(tensors[X][row, -1], self._sampling[item.sequence], item.index)
                token = Token(item.sequence, item.step, item.index, choice.token, choice.logprob, choice.top)
                tokens.append(token)
        times = (*frame.times, spent)
        return Result(frame.deployment, frame.epoch, frame.route, tuple(tokens), tuple(done), outputs, times)


def _beyond(item: Item, tokens: int) -> ResplitError:
    message = f"position {item.position} + {item.count} is beyond the slot's {tokens} tokens"
    return ResplitError(ErrorCode.CONTEXT_EXCEEDED, message)


def _stack(rows: list[Array]) -> Array:
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _input(frame: Activation) -> Array:
    x = frame.tensors.get(X)
    rows = len(frame.items)
    if x is None or x.ndim < 2 or x.shape[0] != rows or any(item.count != x.shape[1] for item in frame.items):
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"a frame of {rows} items without a matching tensor {X!r}")
    return x


def _failure(frame: Activation, error: ResplitError, only: tuple[SequenceId, ...] | None = None) -> Failure:
    sequences = only or tuple(item.sequence for item in frame.items)
    return Failure(frame.deployment, frame.epoch, frame.route, sequences, error.code, error.message)

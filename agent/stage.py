"""One deployment's stages on this node: frames in, frames out, on the compute thread.

Every sequence's progress is kept per stage, so that a hop is idempotent on (sequence, step): the step a
stage last ran may be run again and yields the same bytes; anything older was answered long ago and is
dropped; anything newer means a step was lost on the way, which the ingress is told. A sequence is of one epoch
at a time; when it crosses to the next, blocks that stay here keep their caches (`agent.handover`).
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agent.batching import contiguous_runs
from agent.engine import Engine
from agent.handover import Handover
from agent.kv import KvPool
from agent.numbers import boot_number_of
from agent.sampling import choose
from agent.sequences import Progress, Record, Records
from agent.traces import stage_ended
from profiler.blocks import Call
from schemas.base import Digest, NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Activation, Failure, Item, Result, Reuse, Sampling, SequenceId, StageTime, Token, on_stage
from schemas.tensor import Array

StageOutput = Activation | Result | Failure
X = "x"
"""The name under which a decoder's ids and activations travel."""
RUNS_US = 2_000_000
"""A sequence without a step for so long waits for nobody: it has ended, and its caches are kept."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A frame and how long it waited for the compute thread, in microseconds."""

    frame: Activation
    waited_us: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of a decode frame and its input, [1, 1, ...]."""

    item: Item
    x: Array


class StageHost:
    """Runs frames of one deployment through whichever engine their epoch, route and stage name."""

    def __init__(
        self,
        node: NodeId,
        model: Digest,
        pool: KvPool,
        note: Callable[[Call], None],
        *,
        batch_invariant: bool = True,
        now_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        """`note` hears of every call that ended, on the thread that `run` is called on."""
        self._node = node
        self._model = model
        self._pool = pool
        self._note = note
        self._batch_invariant = batch_invariant
        self._now_us = now_us
        self._engines: dict[tuple[int, int, int], Engine] = {}
        self._records: Records = {}
        self.handover = Handover(node, pool, self._records, self.stages_on, self.blocks_on, now_us)

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
            if engine not in self._engines.values():
                engine.forget(self._pool)
            gone = [block.index for block in engine.blocks if self._pool.drop_block(block)]
            for record in self._records.values():
                for index in gone:
                    record.arrived.pop(index, None)
        self.close([s for s, record in self._records.items() if record.epoch == epoch], epoch)

    def stages_on(self, epoch: int, route: int) -> tuple[int, ...]:
        """The numbers of the stages that this node runs of a route."""
        return tuple(stage for e, r, stage in self._engines if (e, r) == (epoch, route))

    def blocks_on(self, epoch: int, route: int) -> frozenset[int]:
        """The blocks of these stages."""
        engines = [engine for (e, r, _), engine in self._engines.items() if (e, r) == (epoch, route)]
        return frozenset(block.index for engine in engines for block in engine.blocks)

    def engine_key(self, frame: Activation) -> Hashable:
        """Equal for frames that one call may serve: same engine, same stage number."""
        return (id(self), id(self._engines.get((frame.epoch, frame.route, frame.stage))), frame.stage)

    def sequences(self, epoch: int, but_of: str | None = None) -> int:
        """How many sequences of an epoch run that `but_of` does not drive: of others the caches are kept for the next
        turn of a conversation."""
        lately = self._now_us() - RUNS_US
        return sum(
            record.epoch == epoch and record.seen_us >= lately and record.ingress != but_of
            for record in list(self._records.values())
        )

    def ingresses(self, epoch: int, route: int) -> tuple[str, ...]:
        """Who drives sequences of a route."""
        return tuple(dict.fromkeys(r.ingress for r in self._records.values() if r.is_on(epoch, route)))

    def close(self, sequences: Sequence[SequenceId], epoch: int | None = None) -> None:
        """Free everything kept for these sequences, but not for one that has crossed to another epoch than `epoch`."""
        for sequence in sequences:
            record = self._records.get(sequence)
            if record is None:
                continue
            if record.adopting is not None and record.adopting.epoch == epoch:
                record.adopting = None
            if epoch is None or record.epoch == epoch or (record.epoch is None and record.adopting is None):
                self._pool.close(sequence)
                self._traced(self._records.pop(sequence))

    def reuse(self, frame: Reuse) -> None:
        """Let a new sequence begin as one that has ended; if that is not here, its first chunk finds a step lost."""
        record = self._records.get(frame.old)
        if record is None or not record.is_on(frame.epoch, frame.route) or frame.new in self._records:
            return
        if any(progress.tokens < frame.tokens for progress in record.progress.values()):
            return
        try:
            self._pool.reuse(frame.old, frame.new, frame.tokens, frame.capacity)
        except ResplitError:
            return
        del self._records[frame.old]
        at = frame.tokens
        progress = {stage: Progress(at, at) for stage in record.progress}
        fresh = Record(frame.ingress, self._now_us(), frame.epoch, frame.route, frame.sampling, progress)
        self._records[frame.new] = fresh

    def idle(self, limit_us: int, stray_us: int, present: Mapping[NodeId, int]) -> tuple[SequenceId, ...]:
        """Sequences that nobody drove for `limit_us`, or for `stray_us` if the process of their ingress that is
        `present` has another number (`agent.numbers`): who drove them is gone."""
        now_us = self._now_us()

        def is_stray(sequence: SequenceId, ingress: str) -> bool:
            number = boot_number_of(sequence)
            return present.get(NodeId(ingress), number) != number

        return tuple(
            sequence
            for sequence, record in self._records.items()
            if now_us - record.seen_us > (stray_us if is_stray(sequence, record.ingress) else limit_us)
        )

    def of_ingress(self, node: NodeId) -> tuple[SequenceId, ...]:
        """Sequences that `node` drives."""
        return tuple(sequence for sequence, record in self._records.items() if record.ingress == node)

    def run(self, batch: Sequence[Queued]) -> list[StageOutput]:
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
            failed: list[StageOutput] = []
            ran: list[tuple[Queued, dict[str, Array]]]
            match first.kind:
                case "decode":
                    ran = self._decode(engine, batch, failed)
                case "replay":
                    ran = self._replay(engine, batch[0], failed)
                case "prefill":
                    ran = self._prefill(engine, batch[0])
                case "tensor":
                    ran = [(batch[0], engine.run_tensors(first.tensors))]
            spent = self._now_us() - started
            self._count(batch, spent)
            if ran and first.kind != "replay":
                self._note(_call(self._model, engine, ran, started, spent))
            return failed + [self._followed(engine, queued, tensors, spent) for queued, tensors in ran]
        except ResplitError as error:
            return [_failure(queued.frame, error) for queued in batch]
        except Exception as error:  # ONNX Runtime raises many types; none may end the agent.
            message = f"stage {first.stage} failed: {type(error).__name__}: {error}"
            return [_failure(queued.frame, ResplitError(ErrorCode.STAGE_FAILED, message)) for queued in batch]

    def _count(self, batch: Sequence[Queued], spent_us: int) -> None:
        for item in (item for queued in batch for item in queued.frame.items):
            if (record := self._records.get(item.sequence)) is not None:
                record.compute_us += spent_us
                record.calls += 1

    def _traced(self, record: Record) -> None:
        if record.sampling is None or not record.sampling.trace:
            return
        blocks = sorted(
            {block.index for key, e in self._engines.items() if key[0] == record.epoch for block in e.blocks}
        )
        attributes = {
            "resplit.node": self._node,
            "resplit.epoch": record.epoch or 0,
            "resplit.route": record.route,
            "resplit.blocks": blocks,
            "resplit.compute_ms": record.compute_us / 1e3,
            "resplit.calls": record.calls,
        }
        stage_ended(record.sampling.trace, f"stage {self._node}", self._now_us() - record.began_us, attributes)

    def _prefill(self, engine: Engine, queued: Queued) -> list[tuple[Queued, dict[str, Array]]]:
        frame = queued.frame
        [item] = frame.items
        record = self._records.get(item.sequence)
        if record is None and item.position == 0:
            slot = self._pool.open(item.sequence, item.capacity)
            record = Record(frame.ingress, self._now_us(), frame.epoch, frame.route)
            self._records[item.sequence] = record
        if record is not None and item.position == 0 and record.is_on(frame.epoch, frame.route):
            record.progress.setdefault(frame.stage, Progress(0, 0))
        if not self._is_due(record, frame, item):
            return []
        assert record is not None
        slot = self._pool.slot(item.sequence)
        if item.sampling is not None:
            record.sampling = item.sampling
        x = _input(frame)
        if engine.in_place:
            rows = range(slot.row, slot.row + 1)
            y = engine.run_rows(self._pool, slot.tokens, rows, [item.position], x, head=item.wants_token)
        else:
            y = engine.run_appending(self._pool, item.sequence, item.position, x, head=item.wants_token)
        record.advance(frame.stage, item, self._now_us())
        return [(queued, {} if y is None else {X: y})]

    def _decode(
        self, engine: Engine, batch: Sequence[Queued], failed: list[StageOutput]
    ) -> list[tuple[Queued, dict[str, Array]]]:
        """Each frame reduced to the rows that are due, with their results; missing steps go to `failed`."""
        reduced: list[tuple[Queued, list[_Row]]] = []
        # A repeated step may wait beside its successor, which proves that the first run of it was answered.
        newest: dict[SequenceId, int] = {}
        for queued in batch if len(batch) > 1 else ():
            for item in queued.frame.items:
                newest[item.sequence] = max(item.position, newest.get(item.sequence, 0))
        for arrived in batch:
            queued, frame = arrived, arrived.frame
            rows = self._due(frame, failed)
            if newest:
                rows = [row for row in rows if row.item.position == newest[row.item.sequence]]
            if len(rows) < len(frame.items):
                queued = Queued(replace(frame, items=tuple(row.item for row in rows)), queued.waited_us)
            if rows:
                reduced.append((queued, rows))
        wanted = [row for _, rows in reduced for row in rows]
        results = self._steps(engine, wanted, head=True)
        now_us = self._now_us()
        for queued, rows in reduced:
            for row in rows:
                self._records[row.item.sequence].advance(queued.frame.stage, row.item, now_us)
        return [(q, {X: _stack([results[row.item.sequence] for row in rows])}) for q, rows in reduced]

    def _replay(
        self, engine: Engine, queued: Queued, failed: list[StageOutput]
    ) -> list[tuple[Queued, dict[str, Array]]]:
        """Known tokens, in the calls that computed them the first time: one step of all sequences after another."""
        frame = queued.frame
        rows = self._due(frame, failed)
        if not rows:
            return []
        outputs: dict[SequenceId, list[Array]] = {row.item.sequence: [] for row in rows}
        for step in range(rows[0].item.count):
            now = [
                _Row(replace(r.item, position=r.item.position + step, count=1), r.x[:, step : step + 1]) for r in rows
            ]
            results = self._steps(engine, now, head=False)
            for sequence, y in results.items():
                outputs[sequence].append(y)
        for row in rows:
            self._records[row.item.sequence].advance(frame.stage, row.item, self._now_us())
        reduced = Queued(replace(frame, items=tuple(row.item for row in rows)), queued.waited_us)
        whole = [np.concatenate(outputs[row.item.sequence], axis=1) for row in rows if outputs[row.item.sequence]]
        return [(reduced, {X: _stack(whole)} if whole else {})]

    def _due(self, frame: Activation, failed: list[StageOutput]) -> list[_Row]:
        """The rows of a frame that are to be run; missing steps go to `failed`."""
        x, rows = _input(frame), []
        for i, item in enumerate(frame.items):
            try:
                if self._is_due(self._records.get(item.sequence), frame, item):
                    rows.append(_Row(item, x[i : i + 1]))
            except ResplitError as error:
                failed.append(_failure(frame, error, (item.sequence,)))
        return rows

    def _steps(self, engine: Engine, due: Sequence[_Row], *, head: bool) -> dict[SequenceId, Array]:
        """One step of each row; nothing where only the head is here and is not wanted."""
        run = self._run_slices if engine.in_place else self._run_singly
        return run(engine, due, head=head)

    def _run_slices(self, engine: Engine, due: Sequence[_Row], *, head: bool) -> dict[SequenceId, Array]:
        """Decode steps over contiguous slices of rows; rows in between are run along, harmlessly.

        Such a row writes behind all that any block here keeps of its sequence, where its own next step overwrites it.
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
                    record = None if neighbour is None else self._records.get(neighbour)
                    xs.append(np.zeros_like(next(iter(by_row.values())).x))
                    positions.append(min(record.written, tokens - 1) if record is not None else 0)
                y = engine.run_rows(self._pool, tokens, run, positions, _stack(xs), head=head)
                if y is None:
                    continue
                for i, r in enumerate(run):
                    if r in by_row:
                        results[by_row[r].item.sequence] = y[i : i + 1]
        return results

    def _run_singly(self, engine: Engine, due: Sequence[_Row], *, head: bool) -> dict[SequenceId, Array]:
        results = {}
        for row in due:
            y = engine.run_appending(self._pool, row.item.sequence, row.item.position, row.x, head=head)
            if y is not None:
                results[row.item.sequence] = y
        return results

    def _is_due(self, record: Record | None, frame: Activation, item: Item) -> bool:
        """True to run it (again); False if its sequence has crossed to another epoch, or it is an old step.

        Raises if a step is missing, or the sequence has no slot here.
        """
        if record is not None and record.epoch is not None and record.epoch > frame.epoch:
            return False
        progress = (
            None if record is None or not record.is_on(frame.epoch, frame.route) else (record.progress.get(frame.stage))
        )
        if progress is None or item.position > progress.tokens:
            reached = 0 if progress is None else progress.tokens
            message = f"position {item.position} came when {reached} tokens had been run: a step was lost"
            raise ResplitError(ErrorCode.STEP_LOST, message)
        slot = self._pool.slot(item.sequence)
        if item.position + item.count > slot.tokens:
            raise _beyond(item, slot.tokens)
        return item.position >= progress.last

    def _followed(self, engine: Engine, queued: Queued, tensors: dict[str, Array], spent_us: int) -> StageOutput:
        """What follows a frame; one whose masks are no good fails alone."""
        try:
            return self._successor(engine, queued, tensors, spent_us)
        except ResplitError as error:
            return _failure(queued.frame, error)

    def _successor(self, engine: Engine, queued: Queued, tensors: dict[str, Array], spent_us: int) -> StageOutput:
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
                choice = choose(tensors[X][row, -1], self._sampling(item.sequence), item.index, item.allowed)
                token = Token(item.sequence, item.step, item.index, choice.token, choice.logprob, choice.top)
                tokens.append(token)
        times = (*frame.times, spent)
        found = (tuple(tokens), tuple(done), outputs, frame.ingress, times)
        return Result(frame.deployment, frame.epoch, frame.route, *found)

    def _sampling(self, sequence: SequenceId) -> Sampling:
        sampling = self._records[sequence].sampling
        assert sampling is not None, "it travels in every prefill frame and with every hand-over"
        return sampling


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


def _call(
    model: Digest, engine: Engine, ran: Sequence[tuple[Queued, dict[str, Array]]], started_us: int, spent_us: int
) -> Call:
    """What one call did and took; repeated steps that were not run again do not count."""
    kind, items = ran[0][0].frame.kind, [item for queued, _ in ran for item in queued.frame.items]
    assert kind != "replay", "several steps in a row say nothing of one"
    size = len(items) if kind == "decode" else sum(item.count for item in items)
    stage = (model, engine.blocks[0].index, engine.blocks[-1].index)
    context = sum(item.position for item in items) / len(items)
    head = kind == "decode" or not engine.ends_in_head or items[0].wants_token
    return Call(stage, kind, size, spent_us, (started_us + spent_us) / 1e6, context, head)


def _failure(frame: Activation, error: ResplitError, only: tuple[SequenceId, ...] | None = None) -> Failure:
    sequences = only or tuple(item.sequence for item in frame.items)
    return Failure(frame.deployment, frame.epoch, frame.route, sequences, frame.ingress, error.code, error.message)

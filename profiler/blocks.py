"""PURE: the times of blocks as running shows them, from the duration of every call of every stage.

Decode. A call runs several sequences at once, and each beyond `rows_min` adds to it: a step of B sequences takes a +
b*max(0, B - rows_min). Per stage and number of sequences the undisturbed duration is remembered, what longer contexts
add taken off, and how much longer the calls of the last seconds took in sum is the stage's slowdown, s_n(t) of
mathematics.md A1. The line goes through the undisturbed durations; where only one number of sequences was seen, it
keeps the slope that was measured when the blocks were loaded. Both its terms are multiplied by the slowdown. The sum
counts rather than the median, because a processor that is taken away stops one call in several, and most of them not at
all.

Prefill. A chunk's duration over what it would have taken at load time, the median over the latest chunks' tokens.

The stage's time is shared out to its blocks in the proportion in which it was when they were loaded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from schemas.base import Digest
from schemas.capacity import REFERENCE_CONTEXT_TOKENS, BlockTime

WINDOW_S = 3.0
"""A slowdown is over the calls of this long: three heartbeats, after which a change shows in full."""
CALLS_MIN = 8
"""Fewer calls in the window than this are made up by older ones: a stage at rest keeps what it last showed."""
CALLS_MAX = 1024
QUARTILE_CALLS_MIN = 4
CHUNKS = 8
"""Prefill chunks over whose tokens the median is."""
CHUNK_TOKENS_MIN = 16
"""Shorter chunks, the ends of prompts, cost a call and say nothing of a token."""
SLOPE_TRUST_ROWS = 1.0
"""Two numbers of sequences this far apart say as much of the slope as the measurement at load time, which is of one
block alone and of a few steps; twice as far, four times as much."""

StageKey = tuple[Digest, int, int]
"""Model, first and last block."""
Loaded = Mapping[tuple[Digest, int], BlockTime]
"""Of each block, what was measured when it was loaded."""


class Call(NamedTuple):
    """One call of one stage. `size` is the sequences of a decode call, the tokens of a prefill chunk."""

    stage: StageKey
    kind: Literal["prefill", "decode", "tensor"]
    size: int
    compute_us: int
    ended_s: float
    context: float = REFERENCE_CONTEXT_TOKENS
    """Of a decode call: the tokens in the cache of one sequence, on average."""
    head: bool = True
    """False for a chunk that wanted no token, so that a head with a session of its own did not run."""


@dataclass(frozen=True)
class StageTimes:
    """What one stage's calls showed lately."""

    undisturbed_us: Mapping[int, float] = field(default_factory=dict)
    """By sequences in a call: the least that the first quartile of a window's calls ever was."""
    recent: tuple[Call, ...] = ()
    """Decode calls of the window, oldest first, as they would have been behind the reference context."""
    chunks: tuple[Call, ...] = ()

    @property
    def slowdown(self) -> float | None:
        """How many times longer the recent calls took than undisturbed; None before there were enough calls."""
        pairs = [
            (call.compute_us, usual)
            for call in self.recent
            if (usual := self.undisturbed_us.get(call.size)) is not None
        ]
        if not pairs:
            return None
        pairs.sort(key=lambda pair: pair[0] / max(pair[1], 1.0))
        kept = pairs[:-1] if len(pairs) >= CALLS_MIN else pairs  # one hiccup is no slowdown
        return sum(took for took, _ in kept) / max(sum(usual for _, usual in kept), 1.0)


Running = Mapping[StageKey, StageTimes]


@dataclass(frozen=True)
class _Line:
    """A step of a whole stage: `alone` for `rows_min` sequences and fewer, `per_row` more for each beyond."""

    alone: float
    per_row: float | None
    rows_min: int

    def beyond(self, rows: int) -> int:
        return max(0, rows - self.rows_min)

    def at(self, rows: int) -> float:
        return self.alone + (self.per_row or 0.0) * self.beyond(rows)


class _Pace(NamedTuple):
    """A stage's steps beside what they took at load time."""

    loaded: _Line
    now: _Line
    """Undisturbed."""
    slowdown: float
    """By which calls took longer than that lately; 1 where nobody knows."""
    alone: float
    """How many times longer than at load time a step takes with what disturbs it."""


def observe(running: Running, calls: Iterable[Call], now_s: float, loaded: Loaded | None = None) -> Running:
    """What is known after `calls`, in the order of their ends; to be asked about once a heartbeat or so."""
    grouped: dict[StageKey, list[Call]] = {}
    for call in calls:
        if call.size >= 1 and call.compute_us >= 0:
            grouped.setdefault(call.stage, []).append(call)
    found = dict(running)
    for key, new in grouped.items():
        rate = sum([block.decode_ms_per_context_token for block in _blocks(key, loaded or {})])
        found[key] = _observe(running.get(key, StageTimes()), [_at_reference(call, rate) for call in new], now_s)
    return found


def keep(running: Running, stages: Iterable[StageKey]) -> Running:
    """Only what is known of these stages, the ones that are loaded."""
    return {key: running[key] for key in stages if key in running}


def rested(running: Running) -> Running:
    """What is known after a pause: what stages take undisturbed, and nothing of what disturbs them now."""
    return {key: StageTimes(times.undisturbed_us) for key, times in running.items()}


def block_times(running: Running, loaded: Loaded) -> tuple[BlockTime, ...]:
    """Every block's times now, given those measured at load time, in their order.

    A block of two stages has the longer times of both; one whose stages never ran keeps what it had.
    """
    found: dict[tuple[Digest, int], BlockTime] = {}
    for key, times in running.items():
        blocks = _blocks(key, loaded)
        for new in _shared_out(times, blocks):
            other = found.get((new.model, new.block))
            found[new.model, new.block] = new if other is None else _longer(new, other)
    return tuple(found.get(key, time) for key, time in loaded.items())


def slowdown(running: Running, loaded: Loaded) -> float | None:
    """How many times longer than at load time a step takes by `block_times`; None where no stage has run, and the
    times are those of load time."""
    took, usual = 0.0, 0.0
    for key, times in running.items():
        blocks = _blocks(key, loaded)
        if blocks and times.recent:
            alone = _paced(times, blocks).alone
            took += sum([alone * block.decode_ms for block in blocks])
            usual += sum([block.decode_ms for block in blocks])
    return took / usual if took > 0 and usual > 0 else None


def _blocks(key: StageKey, loaded: Loaded) -> list[BlockTime]:
    model, first, last = key
    return [time for i in range(first, last + 1) if (time := loaded.get((model, i))) is not None]


def _at_reference(call: Call, rate: float) -> Call:
    """A decode call as if every sequence of it had the reference context; `rate`: ms that a token of context costs."""
    if call.kind != "decode":
        return call
    more_us = 1e3 * rate * call.size * (call.context - REFERENCE_CONTEXT_TOKENS)
    return call._replace(compute_us=max(0, round(call.compute_us - more_us)))


def _observe(times: StageTimes, calls: list[Call], now_s: float) -> StageTimes:
    chunks = [call for call in calls if call.kind == "prefill" and call.size >= CHUNK_TOKENS_MIN]
    recent = (*times.recent, *(call for call in calls if call.kind == "decode"))[-CALLS_MAX:]
    fresh = sum(now_s - call.ended_s <= WINDOW_S for call in recent)
    recent = recent[-max(fresh, CALLS_MIN) :]
    by_rows: dict[int, list[int]] = {}
    for call in recent:
        by_rows.setdefault(call.size, []).append(call.compute_us)
    undisturbed = dict(times.undisturbed_us)
    for rows, durations in by_rows.items():
        if len(durations) >= QUARTILE_CALLS_MIN:
            quartile = float(sorted(durations)[len(durations) // 4])
            undisturbed[rows] = min(undisturbed.get(rows, quartile), quartile)
    return StageTimes(undisturbed, recent, (*times.chunks, *chunks)[-CHUNKS:])


def _shared_out(times: StageTimes, blocks: Sequence[BlockTime]) -> list[BlockTime]:
    """The times of a stage's blocks now."""
    if not blocks:
        return []
    pace = _paced(times, blocks)
    # What slows a step slows a chunk: the better guess until there is one.
    prefill = _chunk_ratio(times.chunks, blocks) or pace.alone
    return [_scaled(block, pace, prefill) for block in blocks]


def _paced(times: StageTimes, blocks: Sequence[BlockTime]) -> _Pace:
    """A stage's steps now and at load time; it has one block or more."""
    slopes = [block.decode_ms_per_row for block in blocks]
    per_row = None if None in slopes else 1e3 * sum([slope for slope in slopes if slope is not None])
    loaded = _Line(1e3 * sum([b.decode_ms for b in blocks]), per_row, max([b.rows_min for b in blocks]))
    slowdown = times.slowdown
    now = _fitted(times.undisturbed_us, loaded) if times.undisturbed_us else loaded
    if slowdown is None and now.alone > loaded.alone:
        now = loaded  # it never ran undisturbed, or something disturbed it when it was loaded: the least that it took
    alone = (slowdown or 1.0) * (now.alone / loaded.alone if loaded.alone > 0 else 1.0)
    return _Pace(loaded, now, slowdown or 1.0, alone)


def _scaled(block: BlockTime, pace: _Pace, prefill: float) -> BlockTime:
    loaded, now, slowdown, alone = pace
    if loaded.per_row and now.per_row is not None and block.decode_ms_per_row is not None:
        per_row: float | None = slowdown * now.per_row / loaded.per_row * block.decode_ms_per_row
    elif now.per_row is not None and loaded.alone > 0:
        per_row = slowdown * now.per_row / 1e3 * (1e3 * block.decode_ms / loaded.alone)
    else:
        per_row = block.decode_ms_per_row
    return block.model_copy(
        update={
            "decode_ms": alone * block.decode_ms,
            "decode_ms_per_row": per_row,
            "decode_ms_per_context_token": alone * block.decode_ms_per_context_token,
            "prefill_ms_per_token": prefill * block.prefill_ms_per_token,
            "prefill_ms": prefill * block.prefill_ms,
        }
    )


def _fitted(undisturbed_us: Mapping[int, float], loaded: _Line) -> _Line:
    """The line through what was seen, of the slope that was loaded as far as nothing else was."""
    fewest, most = min(undisturbed_us), max(undisturbed_us)
    low, high = undisturbed_us[fewest], undisturbed_us[most]
    between = loaded.beyond(most) - loaded.beyond(fewest)
    if loaded.per_row is None:
        if between:
            per_row = max(0.0, high - low) / between
        elif loaded.beyond(fewest):
            # One sequence never ran alone: its time at load stands in.
            return _Line(loaded.alone, max(0.0, low - loaded.alone) / loaded.beyond(fewest), loaded.rows_min)
        else:
            return _Line(low, None, loaded.rows_min)
    else:
        expected = loaded.at(fewest)
        per_row = loaded.per_row * (low / expected if expected > 0 else 1.0)
        trust = SLOPE_TRUST_ROWS**2
        per_row = max(0.0, ((high - low) * between + per_row * trust) / (between**2 + trust))
    return _Line(max(0.0, low - per_row * loaded.beyond(fewest)), per_row, loaded.rows_min)


def _chunk_ratio(chunks: Sequence[Call], blocks: Sequence[BlockTime]) -> float | None:
    """How many times longer chunks took than at load time: the median over their tokens, as most of a prompt is in
    its long chunks; None before there was one."""
    ratios = sorted(
        (call.compute_us / expected, call.size) for call in chunks if (expected := _chunk_us(call, blocks)) > 0
    )
    half = sum(size for _, size in ratios) / 2
    for ratio, size in ratios:
        half -= size
        if half <= 0:
            return ratio
    return None


def _chunk_us(call: Call, blocks: Sequence[BlockTime]) -> float:
    """What a chunk would have taken at load time."""
    ran = blocks if call.head else blocks[:-1]
    return 1e3 * sum(block.prefill_ms + call.size * block.prefill_ms_per_token for block in ran)


def _longer(one: BlockTime, other: BlockTime) -> BlockTime:
    slopes = [slope for slope in (one.decode_ms_per_row, other.decode_ms_per_row) if slope is not None]
    names = ("decode_ms", "decode_ms_per_context_token", "prefill_ms", "prefill_ms_per_token")
    longer = {name: max(getattr(one, name), getattr(other, name)) for name in names}
    return one.model_copy(update={**longer, "decode_ms_per_row": max(slopes, default=None)})

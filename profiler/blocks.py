"""PURE: the times of blocks as running shows them, from the duration of every call of every stage.

Decode. A call runs several sequences at once, but a block's time is that of one. So per stage and number of rows
(rounded up to a power of two) the undisturbed duration is remembered, and how much longer the calls of the last
seconds took in sum is the stage's slowdown, s_n(t) of mathematics.md A1. The time of one sequence is its own
undisturbed duration times the slowdown. The sum counts rather than the median, because a processor that is taken
away stops one call in several, and most of them not at all.

(Longer contexts take longer too: that shows as a slowdown, since it is what steps cost here now.)

Prefill. A chunk's duration over its tokens, the median over the latest chunks: larger chunks cost less per token,
so what counts is what this node is really given.

The stage's time is shared out to its blocks in the proportion in which it was when they were loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

from schemas.base import Digest
from schemas.capacity import BlockTime

WINDOW_S = 3.0
"""A slowdown is over the calls of this long: three heartbeats, after which a change shows in full."""
CALLS_MIN = 8
"""Fewer calls in the window than this are made up by older ones: a stage at rest keeps what it last showed."""
CALLS_MAX = 1024
QUARTILE_CALLS_MIN = 4
CHUNKS = 8
"""Prefill chunks over which the median is."""
CHUNK_TOKENS_MIN = 16
"""Shorter chunks, the ends of prompts, cost a call and say nothing of a token."""

StageKey = tuple[Digest, int, int]
"""Model, first and last block."""


class Call(NamedTuple):
    """One call of one stage. `size` is the sequences of a decode call, the tokens of a prefill chunk."""

    stage: StageKey
    kind: Literal["prefill", "decode", "tensor"]
    size: int
    compute_us: int
    ended_s: float


@dataclass(frozen=True)
class StageTimes:
    """What one stage's calls showed lately."""

    undisturbed_us: Mapping[int, float] = field(default_factory=dict)
    """By the class of rows: the least that the first quartile of a window's calls ever was."""
    recent: tuple[Call, ...] = ()
    """Decode calls of the window, oldest first."""
    chunk_us_per_token: tuple[float, ...] = ()

    @property
    def slowdown(self) -> float | None:
        """How many times longer the recent calls took than undisturbed; None before there were enough calls."""
        pairs = [
            (call.compute_us, usual)
            for call in self.recent
            if (usual := self.undisturbed_us.get(_rows_class(call.size))) is not None
        ]
        if not pairs:
            return None
        pairs.sort(key=lambda pair: pair[0] / max(pair[1], 1.0))
        kept = pairs[:-1] if len(pairs) >= CALLS_MIN else pairs  # one hiccup is no slowdown
        return sum(took for took, _ in kept) / max(sum(usual for _, usual in kept), 1.0)


Running = Mapping[StageKey, StageTimes]


def observe(running: Running, calls: Iterable[Call], now_s: float) -> Running:
    """What is known after `calls`, in the order of their ends; to be asked about once a heartbeat or so."""
    grouped: dict[StageKey, list[Call]] = {}
    for call in calls:
        if call.size >= 1 and call.compute_us >= 0:
            grouped.setdefault(call.stage, []).append(call)
    return {**running, **{key: _observe(running.get(key, StageTimes()), new, now_s) for key, new in grouped.items()}}


def keep(running: Running, stages: Iterable[StageKey]) -> Running:
    """Only what is known of these stages, the ones that are loaded."""
    return {key: running[key] for key in stages if key in running}


def block_times(running: Running, loaded: Mapping[tuple[Digest, int], BlockTime]) -> tuple[BlockTime, ...]:
    """Every block's times now, given those measured at load time, in their order.

    A block of two stages has the longer times of both; one whose stages never ran keeps what it had.
    """
    found: dict[tuple[Digest, int], BlockTime] = {}
    for (model, first, last), times in running.items():
        blocks = [time for i in range(first, last + 1) if (time := loaded.get((model, i))) is not None]
        decode, prefill = _factors(times, blocks)
        for block in blocks:
            decode_ms, prefill_ms = decode * block.decode_ms, prefill * block.prefill_ms_per_token
            if (other := found.get((model, block.block))) is not None:
                decode_ms, prefill_ms = max(decode_ms, other.decode_ms), max(prefill_ms, other.prefill_ms_per_token)
            changed = {"decode_ms": decode_ms, "prefill_ms_per_token": prefill_ms}
            found[model, block.block] = block.model_copy(update=changed)
    return tuple(found.get(key, time) for key, time in loaded.items())


def _observe(times: StageTimes, calls: list[Call], now_s: float) -> StageTimes:
    chunks = [c.compute_us / c.size for c in calls if c.kind == "prefill" and c.size >= CHUNK_TOKENS_MIN]
    recent = (*times.recent, *(call for call in calls if call.kind == "decode"))[-CALLS_MAX:]
    fresh = sum(now_s - call.ended_s <= WINDOW_S for call in recent)
    recent = recent[-max(fresh, CALLS_MIN) :]
    by_rows: dict[int, list[int]] = {}
    for call in recent:
        by_rows.setdefault(_rows_class(call.size), []).append(call.compute_us)
    undisturbed = dict(times.undisturbed_us)
    for rows, durations in by_rows.items():
        if len(durations) >= QUARTILE_CALLS_MIN:
            quartile = float(sorted(durations)[len(durations) // 4])
            undisturbed[rows] = min(undisturbed.get(rows, quartile), quartile)
    return StageTimes(undisturbed, recent, (*times.chunk_us_per_token, *chunks)[-CHUNKS:])


def _factors(times: StageTimes, blocks: list[BlockTime]) -> tuple[float, float]:
    """By what the load-time figures of a stage are to be multiplied, for a decode step and for prefill."""
    decode_us = 1e3 * sum(block.decode_ms for block in blocks)
    prefill_us = 1e3 * sum(block.prefill_ms_per_token for block in blocks)
    slowdown = times.slowdown
    decode = 1.0
    if slowdown is not None and decode_us > 0:
        decode = slowdown * times.undisturbed_us.get(0, decode_us) / decode_us
    if not times.chunk_us_per_token or prefill_us <= 0:
        return decode, decode  # what slows a step slows a chunk: the better guess until there is one
    return decode, median(times.chunk_us_per_token) / prefill_us


def _rows_class(rows: int) -> int:
    """0 for one row, 1 for two, 2 for three or four, and so on."""
    return (rows - 1).bit_length()

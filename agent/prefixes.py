"""Pure: sequences that have ended and whose caches are kept a while, for the next turn of the conversation.

Only whole chunks of a prompt count: a chunk's end is an absolute position, so the next prompt, prefilled from the
start, would compute exactly those. What came out was computed one step at a time; as part of the next prompt it is
prefilled, and takes other kernels. So an answer never depends on what was kept, and the next turn prefills the last
answer and the new question, however long the history is.
"""

from collections import OrderedDict
from dataclasses import dataclass

from schemas.frame import SequenceId

KEPT_S = 90.0
"""Stages free a sequence that nobody drove for two minutes; until a while before that its caches can be relied on."""


@dataclass(frozen=True, slots=True)
class _Kept:
    tokens: tuple[int, ...]
    capacity: int
    since: float


class Prefixes:
    """What one route has kept, the least recently ended first."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk = chunk_tokens
        self._kept: OrderedDict[SequenceId, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, sequence: SequenceId, prompt: tuple[int, ...], capacity: int, now: float) -> bool:
        """Keep a sequence that has ended; False if no whole chunk of its prompt could serve anybody."""
        whole = len(prompt) // self._chunk * self._chunk
        if whole:
            self._kept[sequence] = _Kept(prompt[:whole], capacity, now)
        return whole > 0

    def longest(self, prompt: tuple[int, ...], now: float) -> tuple[SequenceId, int] | None:
        """The kept sequence that begins as `prompt` does for the longest, and for how many tokens: whole chunks, and
        less than all of it, since the last position's logits are wanted."""
        best: tuple[SequenceId, int] | None = None
        for sequence, kept in self._kept.items():
            common = self._common(kept.tokens, prompt)
            if now - kept.since < KEPT_S and common > (0 if best is None else best[1]):
                best = (sequence, common)
        return best

    def take(self, sequence: SequenceId) -> int:
        """It is reused, or makes room: keep it no more. Its length class."""
        return self._kept.pop(sequence).capacity

    def oldest(self, capacity_min: int, spare: SequenceId | None = None) -> SequenceId | None:
        """What makes room for a sequence of `capacity_min` tokens: the least recently ended, but not `spare`."""
        fits = (s for s, kept in self._kept.items() if kept.capacity >= capacity_min and s != spare)
        return next(fits, None)

    def stale(self, now: float) -> tuple[SequenceId, ...]:
        """Those that cannot be relied on any more."""
        return tuple(sequence for sequence, kept in self._kept.items() if now - kept.since >= KEPT_S)

    def all(self) -> tuple[SequenceId, ...]:
        return tuple(self._kept)

    def _common(self, kept: tuple[int, ...], prompt: tuple[int, ...]) -> int:
        whole = min(len(kept), (len(prompt) - 1) // self._chunk * self._chunk)
        while whole and kept[:whole] != prompt[:whole]:
            whole -= self._chunk
        return whole

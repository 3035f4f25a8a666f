"""Pure: which KV slot each sequence has. Slots of a length class are numbered from 0 and kept dense."""

from dataclasses import dataclass

from schemas.errors import ErrorCode, ResplitError
from schemas.frame import SequenceId


@dataclass(frozen=True, slots=True)
class Slot:
    """Row `row` of the buffers of length class `tokens`."""

    tokens: int
    row: int


@dataclass(frozen=True, slots=True)
class Move:
    """Row `source` is to be copied to row `target`: the sequence that had it fills a hole."""

    tokens: int
    source: int
    target: int
    sequence: SequenceId


class SlotTable:
    """Sequences to slots. Rows 0..n-1 of a class with n sequences are taken, always.

    That density is what lets one call run a whole class as one contiguous slice of its buffers.
    """

    def __init__(self, classes: tuple[tuple[int, int], ...]) -> None:
        """`classes` are (tokens per sequence, number of rows), ascending in tokens."""
        self._rows_max = dict(classes)
        self._rows: dict[int, list[SequenceId]] = {tokens: [] for tokens, _ in classes}
        self._slots: dict[SequenceId, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._slots

    def __getitem__(self, sequence: SequenceId) -> Slot:
        return self._slots[sequence]

    @property
    def sequences(self) -> tuple[SequenceId, ...]:
        return tuple(self._slots)

    def at(self, tokens: int, row: int) -> SequenceId | None:
        """Whose row it is; every row below the number of sequences of a class is somebody's."""
        rows = self._rows[tokens]
        return rows[row] if row < len(rows) else None

    @property
    def longest(self) -> int:
        return max(self._rows_max)

    def rows(self, tokens_min: int) -> int:
        """How many rows there are for sequences of so many tokens, free or taken."""
        return sum(rows for tokens, rows in self._rows_max.items() if tokens >= tokens_min)

    def shortest(self, tokens: int) -> int:
        """The length class that a sequence of so many tokens is for; there must be one."""
        return min(length for length in self._rows_max if length >= tokens)

    def fitting(self, tokens: int) -> int | None:
        """The shortest class that holds `tokens` and has a free row, or None."""
        fits = (t for t, rows in self._rows.items() if t >= tokens and len(rows) < self._rows_max[t])
        return min(fits, default=None)

    def take(self, sequence: SequenceId, tokens: int) -> Slot:
        """Give `sequence` a row of exactly class `tokens`, or the one it has already.

        Raises `ResplitError(OVERLOADED)` when the class has no free row, `INVALID_REQUEST` when there is
        no such class.
        """
        if (held := self._slots.get(sequence)) is not None:
            return held
        if tokens not in self._rows:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"no length class of {tokens} tokens", "capacity")
        rows = self._rows[tokens]
        if len(rows) >= self._rows_max[tokens]:
            message = f"all {self._rows_max[tokens]} slots of {tokens} tokens are taken"
            raise ResplitError(ErrorCode.OVERLOADED, message)
        slot = Slot(tokens, len(rows))
        rows.append(sequence)
        self._slots[sequence] = slot
        return slot

    def rename(self, old: SequenceId, new: SequenceId) -> None:
        """Give the row of `old` to `new`, which has none."""
        slot = self._slots.pop(old)
        self._slots[new] = slot
        self._rows[slot.tokens][slot.row] = new

    def release(self, sequence: SequenceId) -> Move | None:
        """Free the row of `sequence`; the last row of its class then fills the hole, as the Move says."""
        slot = self._slots.pop(sequence, None)
        if slot is None:
            return None
        rows = self._rows[slot.tokens]
        last = rows.pop()
        if last == sequence:
            return None
        rows[slot.row] = last
        self._slots[last] = slot
        return Move(slot.tokens, len(rows), slot.row, last)

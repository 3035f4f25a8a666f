"""Slots: what never happens, whatever the order in which sequences come and go."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.slots import Slot, SlotTable
from schemas.errors import ErrorCode, ResplitError

CLASSES = ((64, 4), (256, 2))


class Slots(RuleBasedStateMachine):
    """A table beside a plain dictionary of what each row holds, moved as the table says."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(CLASSES)
        self.rows: dict[Slot, int] = {}

    @rule(sequence=st.integers(0, 9), tokens=st.sampled_from([64, 256]))
    def take(self, sequence: int, tokens: int) -> None:
        held = sequence in self.table
        taken = sum(slot.tokens == tokens for slot in self.rows)
        try:
            slot = self.table.take(sequence, tokens)
        except ResplitError as error:
            assert error.code is ErrorCode.OVERLOADED
            assert not held
            assert taken == dict(CLASSES)[tokens]
            return
        if held:
            assert self.rows[slot] == sequence
        else:
            assert slot not in self.rows, "a row was given away twice"
            self.rows[slot] = sequence

    @rule(sequence=st.integers(0, 9))
    def release(self, sequence: int) -> None:
        slot = next((s for s, held in self.rows.items() if held == sequence), None)
        move = self.table.release(sequence)
        if slot is None:
            assert move is None
            return
        del self.rows[slot]
        if move is not None:
            self.rows[Slot(move.tokens, move.target)] = self.rows.pop(Slot(move.tokens, move.source))

    @invariant()
    def every_sequence_is_where_its_cache_is(self) -> None:
        for slot, sequence in self.rows.items():
            assert self.table[sequence] == slot
            assert self.table.at(slot.tokens, slot.row) == sequence

    @invariant()
    def rows_are_dense(self) -> None:
        for tokens, _ in CLASSES:
            rows = sorted(slot.row for slot in self.rows if slot.tokens == tokens)
            assert rows == list(range(len(rows)))


TestSlots = Slots.TestCase

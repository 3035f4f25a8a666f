"""Pure: which of the waiting work a stage runs next, in one call."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from schemas.frame import Kind

BRIDGE_ROWS_MAX = 4
"""A batch must be a contiguous slice of rows. Running a row nobody asked for costs a fraction of a row's
arithmetic; a second call streams all weights again. Measured on a 0.7 B int4 model: a call costs about as
much as five rows, so gaps of up to four rows are run along."""


@dataclass(frozen=True, slots=True)
class Work:
    """A frame that waits: which engine runs it, what kind it is, how many rows it has."""

    engine: Hashable
    kind: Kind
    rows: int


def next_batch(waiting: Sequence[Work], last_kind: str | None, rows_max: int) -> tuple[int, ...]:
    """Positions in `waiting` (in order of arrival) of the frames to run in one call; empty if none waits.

    Decode frames of one engine run together, whatever route they came by, up to `rows_max` rows. A
    prefill, replay or tensor frame runs alone. When both wait they alternate, so that a stream of prompts never
    stops the tokens of running sequences, nor the other way round.
    """
    if not waiting:
        return ()
    decodes = [i for i, work in enumerate(waiting) if work.kind == "decode"]
    others = [i for i, work in enumerate(waiting) if work.kind != "decode"]
    if others and (not decodes or last_kind == "decode"):
        return (others[0],)
    first = waiting[decodes[0]]
    batch = [decodes[0]]
    rows = first.rows
    for i in decodes[1:]:
        if waiting[i].engine == first.engine and rows + waiting[i].rows <= rows_max:
            batch.append(i)
            rows += waiting[i].rows
    return tuple(batch)


def contiguous_runs(rows: Sequence[int], rows_min: int = 1, bridge: int = BRIDGE_ROWS_MAX) -> tuple[range, ...]:
    """Cover the given distinct rows by slices of at least `rows_min` rows, bridging gaps of at most `bridge`.

    A slice that would be too short takes in rows beside it, whoever's they are.
    """
    runs: list[range] = []
    for row in sorted(rows):
        if runs and row - runs[-1].stop <= bridge:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return tuple(run if len(run) >= rows_min else _widened(run, rows_min) for run in runs)


def _widened(run: range, rows_min: int) -> range:
    # Towards row 0, since rows below are those that exist for sure.
    start = max(0, run.stop - rows_min)
    return range(start, start + rows_min)

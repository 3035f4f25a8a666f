"""What runs next, and over which rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.batching import BRIDGE_ROWS_MAX, Work, contiguous_runs, next_batch


def decode(engine: str = "a", rows: int = 1) -> Work:
    return Work(engine, "decode", rows)


def prefill(engine: str = "a") -> Work:
    return Work(engine, "prefill", 1)


def test_decode_frames_of_one_engine_run_together_whatever_their_route() -> None:
    assert next_batch([decode(), decode("b"), decode(), prefill()], None, 64) == (0, 2)


def test_a_prefill_chunk_runs_alone() -> None:
    assert next_batch([prefill(), prefill()], None, 64) == (0,)


def test_prefill_and_decode_alternate() -> None:
    waiting = [prefill(), decode(), prefill(), decode()]
    assert next_batch(waiting, "prefill", 64) == (1, 3)
    assert next_batch(waiting, "decode", 64) == (0,)


def test_a_batch_has_at_most_so_many_rows_unless_one_frame_alone_has_more() -> None:
    assert next_batch([decode(rows=5), decode(rows=4), decode(rows=3)], None, 8) == (0, 2)
    assert next_batch([decode(rows=9)], None, 8) == (0,)


def test_nothing_waits_nothing_runs() -> None:
    assert next_batch([], "decode", 8) == ()


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([3, 1, 2], [range(1, 4)]),
        ([0, BRIDGE_ROWS_MAX + 1], [range(BRIDGE_ROWS_MAX + 2)]),
        ([0, BRIDGE_ROWS_MAX + 2], [range(1), range(BRIDGE_ROWS_MAX + 2, BRIDGE_ROWS_MAX + 3)]),
    ],
)
def test_small_gaps_are_bridged_and_large_ones_are_not(rows: list[int], runs: list[range]) -> None:
    assert list(contiguous_runs(rows)) == runs


@given(st.sets(st.integers(0, 200), min_size=1))
def test_runs_cover_every_row_once_and_do_not_touch(rows: set[int]) -> None:
    runs = contiguous_runs(sorted(rows))
    covered = [row for run in runs for row in run]
    assert len(covered) == len(set(covered))
    assert rows <= set(covered)
    assert all(run.start in rows and run.stop - 1 in rows for run in runs)

"""When a NATS connection is given up, and when it is tried again."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from bus.connection import EAGER
from natstls.client import PATIENT
from natstls.patience import ATTEMPT_S, SILENT_S, Backoff, Seen, Watch, backoff_s, fault, watched

UP = Seen(connected=True, heard=100, attempts=1, reading=True, trying=False)
DOWN = replace(UP, connected=False, trying=True)
draws = st.floats(0, 1, exclude_max=True)


def after(seen: Seen, still_s: float) -> str | None:
    """What is said after nothing has come of it for so long, in looks of half a second."""
    watch = Watch(seen)
    for _ in range(round(still_s / 0.5)):
        watch = watched(watch, seen, 0.5)
    return fault(watch)


def test_a_connection_that_is_heard_is_left_alone_for_ever() -> None:
    watch = Watch(UP)
    for heard in range(1000):
        watch = watched(watch, replace(UP, heard=heard), 0.9 * SILENT_S)
        assert fault(watch) is None


def test_a_silent_one_is_given_up_in_time_and_not_before() -> None:
    assert after(UP, SILENT_S - 0.5) is None
    assert "nothing came" in str(after(UP, SILENT_S))


def test_time_asleep_is_nobodys_silence() -> None:
    watch = Watch(UP)
    for _ in range(9):
        watch = watched(watch, UP, 0.5)
    assert fault(watched(watch, UP, 0.0)) is None


def test_without_a_reader_it_is_given_up_at_once() -> None:
    assert "nobody reads" in str(fault(Watch(replace(UP, reading=False))))


def test_a_server_that_is_cut_off_from_the_others_is_left_at_once() -> None:
    assert "cut off" in str(fault(Watch(replace(UP, cut_off=True))))


def test_a_lost_one_is_left_alone_while_attempts_are_made() -> None:
    watch = Watch(DOWN)
    for attempts in range(1000):
        watch = watched(watch, replace(DOWN, attempts=attempts), 0.9 * ATTEMPT_S)
        assert fault(watch) is None
    assert after(DOWN, ATTEMPT_S - 0.5) is None
    assert "no attempt" in str(after(DOWN, ATTEMPT_S))
    assert "nobody tries" in str(fault(Watch(replace(DOWN, trying=False))))


@given(st.integers(0, 10_000), draws, st.floats(0.01, 5), st.floats(0.01, 60))
def test_a_wait_is_in_the_upper_half_of_what_there_is(attempt: int, draw: float, first: float, most: float) -> None:
    within = Backoff(first, most)
    wait, ceiling = backoff_s(attempt, draw, within), min(most, first * 2 ** min(attempt, 32))
    assert ceiling / 2 <= wait <= ceiling
    assert backoff_s(attempt, 0.0, within) <= backoff_s(attempt + 1, 0.0, within)


@given(st.integers(0, 100), st.integers(0, 100), draws, draws)
def test_agents_try_at_least_as_often_as_clients(one: int, other: int, draw: float, other_draw: float) -> None:
    assert backoff_s(one, draw, EAGER) <= backoff_s(other, other_draw, PATIENT)


def test_a_thousand_agents_spread() -> None:
    waits = sorted(backoff_s(9, number / 1000, EAGER) for number in range(1000))
    assert waits[-1] - waits[0] > 0.49 * EAGER.most_s
    assert max(sum(low <= wait < low + 0.01 for wait in waits) for low in waits) < 100

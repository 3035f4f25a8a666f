"""What a request is predicted to take, and who goes first."""

from dataclasses import replace

import pytest

from agent.forecast import PRUDENCE, Line, Work, forecast, forecast_calls
from agent.pace import CALLS_MIN, FRESH_S, Likened, Pace, Timing
from agent.urgency import PATIENCE_S, PRIORITY_S, urgency
from schemas.slo import BEST_EFFORT, PRIORITY_MAX, Slo

CHUNK = 16


def measured(step_s: float = 0.01, each_s: float = 0.0, chunk_s: float = 0.1) -> Pace:
    """A pace: steps of `step_s` and `each_s` more a sequence, chunks of `chunk_s` whatever their size."""
    pace = Pace()
    for i in range(1, 9):
        pace.step.add(i, step_s + each_s * i, 0.0)
        pace.chunk.add(CHUNK, chunk_s, 0.0)
    return pace


def line(running: list[Work] | None = None, ahead: list[Work] | None = None, slots: int = 2) -> Line:
    return Line(slots, slots, CHUNK, 1, running or (), ahead or ())


def test_before_anything_was_measured_nobody_knows_the_pace() -> None:
    pace = Pace()
    assert not pace.generates(0.0)
    for _ in range(CALLS_MIN):
        pace.chunk_took(CHUNK, 0.1, 0, 0.1, 0.0)
    assert not pace.generates(0.0), "nobody knows how long a step takes"
    assert forecast_calls(pace, 4, 0, 1, 0.0) is None


def test_what_was_measured_long_ago_says_nothing() -> None:
    assert measured().generates(FRESH_S - 1)
    assert not measured().generates(FRESH_S)
    assert not measured().generates(5.0, fresh_s=5.0)


def test_one_slow_call_is_forgotten_when_the_evidence_was_stale() -> None:
    timing = Timing()
    timing.add(1, 100.0, 0.0)
    for i in range(CALLS_MIN):
        timing.add(1, 0.1, FRESH_S + i)
    assert timing.seconds(1) == pytest.approx(0.1)


def test_a_lone_request_takes_its_chunks_and_its_steps() -> None:
    found = forecast(measured(), line(), Work(2 * CHUNK + 1, 11))
    assert [found.wait_ms, found.tpot_ms] == pytest.approx([0, 10])
    assert found.ttft_ms == pytest.approx(300)
    assert found.e2e_ms == pytest.approx(300 + 10 * 10)


def test_chunks_that_follow_each_other_take_what_the_busiest_stage_takes() -> None:
    pace = measured()
    for i in range(CALLS_MIN):  # three chunks of a prompt at once: the first is through after 100 ms, then one each 30
        for ahead in range(3):
            pace.chunk_took(CHUNK, 0.1 + 0.03 * ahead, ahead, 0.03 if ahead else 0.1, i)
    assert (pace.chunk_s(CHUNK), pace.gap_s(CHUNK)) == pytest.approx((0.1, 0.03))
    alone = forecast(pace, line(), Work(4 * CHUNK, 1))
    assert alone.ttft_ms == pytest.approx(100 + 3 * 30)
    behind = forecast(pace, line([Work(4 * CHUNK, 1)]), Work(4 * CHUNK, 1))
    assert behind.ttft_ms == pytest.approx(alone.ttft_ms + 4 * 30)
    on_their_way = replace(line(), chunks_in_flight=2)
    assert forecast(pace, on_their_way, Work(4 * CHUNK, 1)).ttft_ms == pytest.approx(alone.ttft_ms + 2 * 30)


def test_a_route_takes_what_another_takes_and_what_its_nodes_say_that_they_take_more() -> None:
    slower, faster = Likened(measured(), 0.02, 0.001, 0.0005), Likened(measured(), -1.0, -1.0, -1.0)
    assert (slower.step_s(1), slower.chunk_s(CHUNK), slower.gap_s(CHUNK)) == pytest.approx((0.03, 0.116, 0.108))
    assert (faster.step_s(1), faster.chunk_s(CHUNK), faster.gap_s(CHUNK)) == pytest.approx((0.001, 0.01, 0.01))


def test_what_is_cached_is_not_prefilled() -> None:
    whole, cached = (forecast(measured(), line(), Work(tokens, 1)) for tokens in (5 * CHUNK, CHUNK))
    assert whole.ttft_ms - cached.ttft_ms == pytest.approx(400)


def test_a_request_waits_for_the_slot_that_is_free_first_and_behind_those_ahead() -> None:
    running = [Work(0, 100), Work(0, 20)]
    alone = forecast(measured(), line(running), Work(1, 1))
    behind = forecast(measured(), line(running, [Work(1, 50)]), Work(1, 1))
    assert alone.wait_ms == pytest.approx(200)
    # The one ahead takes that slot until 200 + 100 + 500 ms; at 800 the other one has ended too, at 1000.
    assert behind.wait_ms == pytest.approx(800)


def test_a_sequence_in_a_slot_that_is_too_short_for_the_request_keeps_nobody_waiting_for_it() -> None:
    short = [Work(0, 100, contends=False)] * 3
    found = forecast(measured(), line(short, slots=1), Work(1, 1))
    assert found.wait_ms == 0


def test_a_fuller_route_decodes_more_slowly() -> None:
    pace = measured(step_s=0.01, each_s=0.002)
    idle, busy = (forecast(pace, line(running, slots=8), Work(1, 2)) for running in ([], [Work(0, 5)] * 6))
    assert idle.tpot_ms == pytest.approx(12)
    assert busy.tpot_ms == pytest.approx(24)


def test_no_call_is_predicted_to_take_less_for_being_larger_or_less_than_nothing() -> None:
    falling, steep = Timing(), Timing()
    for size in range(1, 9):
        falling.add(size, 1.0 / size, 0.0)
        steep.add(size, 0.01 * size * size, 0.0)
    assert falling.seconds(100) >= falling.seconds(1) > 0
    assert steep.seconds(1) >= 0
    assert steep.seconds(0) >= 0


def test_calls_go_in_rounds_of_as_many_as_there_are_slots() -> None:
    pace = Pace()
    for _ in range(CALLS_MIN):
        pace.call.add(1, 0.2, 0.0)
    found = forecast_calls(pace, 4, 6, 3, 0.0)
    assert found is not None
    assert [found.wait_ms, found.e2e_ms] == pytest.approx([200, 600])


def test_a_deadline_is_given_up_only_well_past_it() -> None:
    found = forecast(measured(), line(), Work(1, 91))
    assert found.e2e_ms == pytest.approx(1000)
    assert found.attains(1001 / PRUDENCE)
    assert not found.attains(999 / PRUDENCE)


def test_of_two_that_come_together_the_higher_priority_goes_first_whatever_their_targets() -> None:
    tight = urgency(Slo(ttft_ms=1, deadline_ms=1), 5.0)
    high = urgency(Slo(priority=1), 5.0)
    assert high.due < tight.due < urgency(BEST_EFFORT, 5.0).due


def test_of_one_priority_the_earlier_due_goes_first() -> None:
    early, late = urgency(Slo(ttft_ms=200), 5.0), urgency(Slo(ttft_ms=2000), 4.0)
    assert early.due < late.due
    with_a_deadline = urgency(Slo(deadline_ms=2000), 5.0, tokens=100, rest_s=1.9)
    assert with_a_deadline.due < early.due, "its first token is due when its last ones can still be in time"


def test_nobody_starves_behind_a_stream_of_those_that_go_first() -> None:
    lowest = urgency(Slo(priority=-PRIORITY_MAX), 0.0)
    highest = [urgency(Slo(priority=PRIORITY_MAX, ttft_ms=1), float(t)) for t in range(0, 2000, 10)]
    overtaking = [one for one in highest if one.due < lowest.due]
    assert len(overtaking) < len(highest)
    assert lowest.due == PATIENCE_S + PRIORITY_S * PRIORITY_MAX

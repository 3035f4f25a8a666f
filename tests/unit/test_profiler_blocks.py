"""Block times follow what calls show: a processor taken away, and given back."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from agent.blocktimes import REST_S, BlockTimes
from profiler.blocks import CALLS_MAX, Call, Running, StageKey, block_times, keep, observe, rested
from schemas.base import Digest, NodeId
from schemas.capacity import BlockTime
from schemas.deployment import Settings, Stage
from schemas.plan import Plan
from tests.nodes import plan_of

MODEL, OTHER = Digest("1" * 64), Digest("2" * 64)
STAGE: StageKey = (MODEL, 0, 2)
LOADED = {
    (MODEL, i): BlockTime(model=MODEL, block=i, decode_ms=decode_ms, prefill_ms_per_token=0.1)
    for i, decode_ms in enumerate((1.0, 2.0, 2.0))
}
"""A stage that took 5 ms for a step and 0.3 ms for a token of a prompt when it was loaded."""
Duration = Callable[[], float]


def steps(start_s: float, ms: Duration, rows: int = 1, stage: StageKey = STAGE) -> Iterator[Call]:
    """Decode calls one after the other, without end."""
    now_s = start_s
    while True:
        took_ms = ms()
        now_s += took_ms / 1e3
        yield Call(stage, "decode", rows, int(1e3 * took_ms), now_s)


class Node:
    """A node that runs calls and asks once a heartbeat."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.running: Running = {}

    def beats(self, count: int, ms: Duration, rows: int = 1) -> list[float]:
        """`count` heartbeats of decode calls; what each says that a step of the whole stage takes, in ms."""
        said = []
        for _ in range(count):
            calls = itertools.takewhile(self._is_over, steps(self.now_s, ms, rows))
            noted, self.now_s = list(calls), self.now_s + 1.0
            self.running = observe(self.running, noted, self.now_s)
            said.append(self.step_ms)
        return said

    def _is_over(self, call: Call) -> bool:
        return call.ended_s <= self.now_s + 1.0

    @property
    def step_ms(self) -> float:
        return sum(time.decode_ms for time in block_times(self.running, LOADED))


def noisy(ms: float, seed: int = 0) -> Duration:
    """`ms` with 20 % of noise."""
    rng = np.random.default_rng(seed)
    return lambda: float(ms * rng.uniform(0.9, 1.1))


def stalled(ms: float, share: float, quota_ms: float = 50.0) -> Duration:
    """As a CPU quota does it: full speed until `quota_ms` are used, then a long stop; `share` of the time is left."""
    used = 0.0

    def took() -> float:
        nonlocal used
        used += ms
        if used < quota_ms:
            return ms
        used = 0.0
        return ms + quota_ms * (1 / share - 1)

    return took


def test_before_any_call_a_block_has_the_times_of_its_load() -> None:
    assert block_times({}, LOADED) == tuple(LOADED.values())
    assert block_times(observe({}, [], 1.0), LOADED) == tuple(LOADED.values())


def test_a_steady_step_is_reported_as_it_is_and_shared_out_as_at_load_time() -> None:
    node = Node()
    assert node.beats(5, lambda: 10.0)[-1] == pytest.approx(10.0)
    assert [time.decode_ms for time in block_times(node.running, LOADED)] == pytest.approx([2.0, 4.0, 4.0])


def test_noise_of_a_fifth_is_not_reported_as_a_change() -> None:
    said = Node().beats(60, noisy(6.0))
    assert all(5.8 < ms < 6.2 for ms in said)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_three_times_slower_shows_within_three_heartbeats_and_passes_as_soon(rows: int) -> None:
    node = Node()
    before = node.beats(10, noisy(6.0), rows)[-1]
    slowed = node.beats(3, noisy(18.0), rows)
    assert slowed[1] > 1.5 * before
    assert slowed[2] == pytest.approx(3 * before, rel=0.1)
    after = node.beats(3, noisy(6.0), rows)
    assert after[2] == pytest.approx(before, rel=0.1)


def test_a_processor_that_is_taken_away_in_slices_shows_although_most_calls_are_as_fast_as_ever() -> None:
    node = Node()
    assert node.beats(10, lambda: 5.0)[-1] == pytest.approx(5.0)
    taken = stalled(5.0, share=1 / 3)
    assert sum(taken() > 5 for _ in range(100)) <= 10
    assert 13 < node.beats(3, taken)[-1] < 16
    assert node.beats(4, lambda: 5.0)[-1] == pytest.approx(5.0)


def test_one_call_that_hangs_moves_nothing() -> None:
    node = Node()
    node.beats(10, lambda: 5.0)
    durations = iter([5.0] * 20 + [400.0])
    assert node.beats(1, lambda: next(durations, 5.0)) == pytest.approx([5.0])


def test_the_time_of_one_sequence_is_not_that_of_the_batch() -> None:
    node = Node()
    assert node.beats(3, lambda: 6.0, rows=1)[-1] == pytest.approx(6.0)
    assert node.beats(5, lambda: 15.0, rows=8)[-1] == pytest.approx(6.0)
    assert node.beats(3, lambda: 45.0, rows=8)[-1] == pytest.approx(18.0, rel=0.1)
    assert node.beats(4, lambda: 6.0, rows=1)[-1] == pytest.approx(6.0)


def test_where_one_sequence_never_ran_alone_its_time_at_load_stands_in() -> None:
    node = Node()
    assert node.beats(3, lambda: 15.0, rows=8)[-1] == pytest.approx(5.0)
    assert node.beats(3, lambda: 30.0, rows=8)[-1] == pytest.approx(10.0, rel=0.1)


def test_a_stage_at_rest_keeps_what_it_last_showed() -> None:
    node = Node()
    node.beats(5, lambda: 10.0)
    node.now_s += 3600
    node.running = observe(node.running, [], node.now_s)
    assert node.step_ms == pytest.approx(10.0)


def test_slow_steps_of_which_a_heartbeat_sees_one_are_seen_too() -> None:
    assert Node().beats(8, lambda: 900.0)[-1] == pytest.approx(900.0)


def test_prefill_is_per_token_and_the_ends_of_prompts_do_not_count() -> None:
    chunks = [Call(STAGE, "prefill", 128, 128 * 150, float(i)) for i in range(8)]
    ends = [Call(STAGE, "prefill", 3, 4000, float(i)) for i in range(8)]
    running = observe({}, [*chunks, *ends], 9.0)
    assert sum(t.prefill_ms_per_token for t in block_times(running, LOADED)) == pytest.approx(0.15)
    assert sum(t.decode_ms for t in block_times(running, LOADED)) == pytest.approx(5.0)


def test_until_a_chunk_ran_what_slows_steps_slows_prefill() -> None:
    node = Node()
    node.beats(5, lambda: 10.0)
    assert sum(t.prefill_ms_per_token for t in block_times(node.running, LOADED)) == pytest.approx(0.6)


def test_a_block_of_two_stages_has_the_longer_times() -> None:
    narrow: StageKey = (MODEL, 0, 0)
    calls = itertools.islice(steps(0.0, lambda: 5.0), 20)
    alone = itertools.islice(steps(0.0, lambda: 4.0, stage=narrow), 20)
    running = observe({}, [*calls, *alone], 1.0)
    assert [t.decode_ms for t in block_times(running, LOADED)] == pytest.approx([4.0, 2.0, 2.0])
    assert [t.decode_ms for t in block_times(keep(running, [STAGE]), LOADED)] == pytest.approx([1.0, 2.0, 2.0])


def test_what_is_kept_is_bounded_and_stages_that_are_gone_are_forgotten() -> None:
    calls = list(itertools.islice(steps(0.0, lambda: 0.01), 10 * CALLS_MAX))
    running = observe({}, calls, calls[-1].ended_s)
    assert len(running[STAGE].recent) == CALLS_MAX
    assert keep(running, [(OTHER, 0, 2)]) == {}
    assert block_times(running, {}) == ()


def test_calls_that_took_no_time_or_were_of_nothing_break_nothing() -> None:
    empty = [Call(STAGE, "decode", 0, 5, 0.0), Call(STAGE, "tensor", 1, 5, 0.0), Call(STAGE, "decode", 1, -1, 0.0)]
    assert block_times(observe({}, empty, 1.0), LOADED) == tuple(LOADED.values())
    instant = [Call(STAGE, "decode", 1, 0, 0.0)] * 20
    assert all(t.decode_ms >= 0 for t in block_times(observe({}, instant, 1.0), LOADED))


SLOPED = {key: time.model_copy(update={"decode_ms_per_row": 0.4, "rows_min": 2}) for key, time in LOADED.items()}
"""As above, and 1.2 ms more for each sequence beyond the second."""


def stage_of(times: tuple[BlockTime, ...]) -> tuple[float, float]:
    """What a step of the whole stage takes alone, and what each further sequence adds."""
    return sum(t.decode_ms for t in times), sum(t.decode_ms_per_row or 0.0 for t in times)


def after(loaded: dict[tuple[Digest, int], BlockTime], *calls: Iterator[Call]) -> tuple[float, float]:
    """What is said after twenty calls of each kind."""
    noted = [call for some in calls for call in itertools.islice(some, 20)]
    running = observe({}, noted, max(call.ended_s for call in noted), loaded)
    return stage_of(block_times(running, loaded))


def test_where_one_number_of_sequences_was_seen_the_line_keeps_the_slope_of_its_load() -> None:
    assert stage_of(block_times({}, SLOPED)) == pytest.approx((5.0, 1.2))
    # Eight took 5 + 6 * 1.2 = 12.2 ms when the blocks were loaded, and now take twice as long.
    assert after(SLOPED, steps(0.0, lambda: 24.4, rows=8)) == pytest.approx((10.0, 2.4), rel=1e-3)
    assert after(SLOPED, steps(0.0, lambda: 10.0, rows=1)) == pytest.approx((10.0, 2.4), rel=1e-3)


def test_where_several_were_seen_the_line_goes_through_them() -> None:
    alone, per_row = after(SLOPED, steps(0.0, lambda: 5.0), steps(0.1, lambda: 9.0, rows=32))
    assert alone == pytest.approx(5.0)
    assert per_row == pytest.approx(4 / 30, rel=0.05)


def test_what_nobody_measured_at_load_time_is_learned() -> None:
    assert after(LOADED, steps(0.0, lambda: 6.0), steps(0.2, lambda: 15.0, rows=8)) == pytest.approx((6.0, 9 / 7))
    assert (
        block_times(observe({}, itertools.islice(steps(0.0, lambda: 6.0), 20), 1.0), LOADED)[0].decode_ms_per_row
        is None
    )


def test_longer_contexts_are_no_slowdown() -> None:
    loaded = {key: time.model_copy(update={"decode_ms_per_context_token": 0.001}) for key, time in LOADED.items()}
    far = [call._replace(context=1128) for call in itertools.islice(steps(0.0, lambda: 8.0), 20)]
    near = [call._replace(context=128) for call in itertools.islice(steps(0.0, lambda: 5.0), 20)]
    for calls in (far, near):  # a thousand tokens more take 3 ms more
        assert stage_of(block_times(observe({}, calls, 1.0, loaded), loaded))[0] == pytest.approx(5.0)


def test_a_chunk_that_skipped_the_head_says_nothing_of_it() -> None:
    heavy = LOADED | {(MODEL, 2): LOADED[MODEL, 2].model_copy(update={"prefill_ms_per_token": 1.0})}
    skipped = Call(STAGE, "prefill", 128, 128 * 400, 1.0, head=False)  # twice as long as at load, without the head
    times = block_times(observe({}, [skipped], 1.0, heavy), heavy)
    assert [t.prefill_ms_per_token for t in times] == pytest.approx([0.2, 0.2, 2.0])


def test_a_long_chunk_says_more_than_several_short_ones() -> None:
    short = [Call(STAGE, "prefill", 32, 32 * 900, float(i)) for i in range(3)]
    running = observe({}, [*short, Call(STAGE, "prefill", 128, 128 * 150, 4.0)], 5.0)
    assert sum(t.prefill_ms_per_token for t in block_times(running, LOADED)) == pytest.approx(0.15)


def plans_here() -> list[Plan]:
    """One plan that puts the stage on this node."""
    stages = [Stage(node=NodeId("n0"), first=0, last=2)]
    return [plan_of(1, stages, Settings(), 3).model_copy(update={"model": MODEL})]


def test_after_a_pause_times_are_those_of_load_time_until_calls_show_others() -> None:
    now_s = 0.0
    times = BlockTimes(NodeId("n0"), lambda: now_s)
    plans = plans_here()
    assert times.at_rest
    now_s = 0.1
    for call in itertools.islice(steps(0.0, lambda: 5.0), 20):
        times.note(call)
    times.now(LOADED, plans)
    for call in itertools.islice(steps(now_s, lambda: 20.0), 250):
        times.note(call)
    now_s += 250 * 0.02
    rests, took_ms, slowdowns = [times.at_rest], [stage_of(times.now(LOADED, plans))[0]], [times.slowdown]
    now_s += REST_S
    rests.append(times.at_rest)
    took_ms.append(stage_of(times.now(LOADED, plans))[0])
    slowdowns.append(times.slowdown)
    assert rests == [False, True]
    assert took_ms == pytest.approx([20.0, 5.0])
    assert slowdowns == [pytest.approx(4.0), None]
    for call in itertools.islice(steps(now_s, lambda: 10.0), 20):
        times.note(call)
    now_s += 0.5
    assert stage_of(times.now(LOADED, plans))[0] == pytest.approx(10.0, rel=0.1), "what is undisturbed it still knows"


@pytest.mark.parametrize("undisturbed_ms", [1.0, 5.0, 20.0])
def test_a_stage_at_rest_takes_the_least_of_what_it_took_when_it_was_loaded_and_since(undisturbed_ms: float) -> None:
    running = rested(observe({}, itertools.islice(steps(0.0, lambda: undisturbed_ms), 20), 1.0))
    assert stage_of(block_times(running, LOADED))[0] == pytest.approx(min(undisturbed_ms, 5.0))


def test_a_node_whose_stage_takes_next_to_nothing_is_at_rest() -> None:
    now_s = 0.0
    times = BlockTimes(NodeId("n0"), lambda: now_s)
    plans = plans_here()
    for _ in range(10):
        now_s += 1.0
        for _ in range(50):
            times.note(Call(STAGE, "decode", 1, 20, now_s))
        times.now(LOADED, plans)
        assert times.at_rest
        assert times.slowdown is None
    times.note(Call(STAGE, "decode", 1, 31_000, now_s))
    assert not times.at_rest

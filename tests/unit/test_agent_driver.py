"""Driving sequences over a route: chunks, groups, answers that come twice or not at all."""

from typing import Any

from agent.driver import ATTEMPTS_MAX, STALL_FIRST_S, STALL_FLOOR_S, Prompt, RouteDriver
from agent.urgency import Urgency
from schemas.frame import Activation, Result, Sampling, Token


def driver(depth: int = 1, chunk: int = 4, stages: int = 1) -> RouteDriver:
    return RouteDriver("d", 1, 0, "n0", chunk, depth, stages)


def prompt(sequence: int, length: int) -> Prompt:
    return Prompt(sequence, tuple(range(10, 10 + length)), 64, Sampling())


def answer(frame: Activation, token: int = 7) -> Result:
    """What the last stage says to a frame."""
    tokens = tuple(Token(i.sequence, i.step, i.index, token) for i in frame.items if i.wants_token)
    done = tuple((i.sequence, i.step) for i in frame.items if not i.wants_token)
    return Result("d", 1, 0, tokens, done, {}, "n0", ())


def ids(frame: Activation) -> Any:
    return frame.tensors["x"].tolist()


def prefilled(d: RouteDriver, *sequences: int) -> None:
    """Admit one-token prompts, answer them, and have each wait for its second step."""
    for sequence in sequences:
        d.admit(prompt(sequence, 1))
    while frames := d.frames(0.0):
        for frame in frames:
            d.take(answer(frame), 0.1)
    for sequence in sequences:
        d.go_on(sequence, 100 + sequence)


def test_chunks_end_at_absolute_multiples_and_only_the_last_wants_a_token() -> None:
    d = driver(depth=9)
    d.admit(prompt(1, 10))
    frames = d.frames(0.0)
    assert [ids(f) for f in frames] == [[[10, 11, 12, 13]], [[14, 15, 16, 17]], [[18, 19]]]
    assert [f.items[0].position for f in frames] == [0, 4, 8]
    assert [f.items[0].wants_token for f in frames] == [False, False, True]


def test_a_shared_route_has_one_chunk_in_flight() -> None:
    d = driver(depth=1)
    d.admit(prompt(1, 10))
    [first] = d.frames(0.0)
    assert d.frames(0.0) == []
    d.take(answer(first), 0.1)
    [second] = d.frames(0.1)
    assert second.items[0].step == 1


def test_every_ready_sequence_is_in_the_one_group() -> None:
    d = driver()
    prefilled(d, 1, 2, 3)
    [frame] = d.frames(1.0)
    assert ids(frame) == [[101], [102], [103]]
    assert [(i.position, i.index) for i in frame.items] == [(1, 1)] * 3


def test_two_groups_share_the_sequences_between_them() -> None:
    d = driver(depth=2)
    prefilled(d, 1, 2, 3, 4)
    assert [[i.sequence for i in f.items] for f in d.frames(1.0)] == [[1, 2], [3, 4]]


def test_what_is_driven_anew_has_all_its_attempts_before_it_and_tells_nothing_of_the_pace() -> None:
    d = driver()
    prefilled(d, 1, 2)
    took = dict(d.typical_s)
    [frame] = d.frames(1.0)
    patience_s = STALL_FIRST_S  # none of its kind was timed
    for _ in range(ATTEMPTS_MAX - 1):
        assert d.overdue(1.0 + ATTEMPTS_MAX * patience_s)[0]
    now = 1.0 + ATTEMPTS_MAX * patience_s
    d.end([2])
    [anew] = d.anew(now)
    assert [item.sequence for item in anew.items] == [1]
    assert d.overdue(now + patience_s / 2) == ([], ())
    assert [len(d.overdue(now + n * patience_s)[0]) for n in range(1, ATTEMPTS_MAX + 1)] == [1, 1, 1, 0]
    [step] = d.take(answer(frame), now)
    assert step.elapsed_s == now - 1.0, "as whoever waits for it sees it"
    assert d.typical_s == took


def test_an_answer_that_comes_twice_counts_once() -> None:
    d = driver()
    d.admit(prompt(1, 3))
    [frame] = d.frames(0.0)
    [step] = d.take(answer(frame), 0.1)
    assert step.token is not None
    assert (step.token.token, step.elapsed_s) == (7, 0.1)
    assert d.take(answer(frame), 0.2) == []


def test_an_answer_for_a_sequence_that_ended_is_nothing() -> None:
    d = driver()
    d.admit(prompt(1, 3))
    [frame] = d.frames(0.0)
    assert d.end([1]) == (1,)
    assert d.take(answer(frame), 0.1) == []
    assert d.end([1]) == ()
    d.admit(prompt(2, 3))
    assert len(d.frames(0.2)) == 1, "the ended sequence's chunk no longer counts as in flight"


def test_a_step_that_stays_unanswered_is_driven_again_and_at_last_given_up() -> None:
    d = driver()
    d.admit(prompt(1, 3))
    [frame] = d.frames(0.0)
    assert d.overdue(STALL_FIRST_S - 1) == ([], ())
    for attempt in range(1, ATTEMPTS_MAX):
        again, lost = d.overdue(STALL_FIRST_S * attempt + 1)
        assert ([ids(f) for f in again], lost) == ([ids(frame)], ())
    assert d.overdue(STALL_FIRST_S * ATTEMPTS_MAX + 1) == ([], (1,))


def test_patience_follows_what_a_step_lately_took() -> None:
    d = driver()
    prefilled(d, 1)
    [step] = d.frames(10.0)
    d.take(answer(step), 10.01)
    d.go_on(1, 5)
    d.frames(20.0)
    assert d.overdue(20.0 + STALL_FLOOR_S - 0.1) == ([], ())
    again, _ = d.overdue(20.0 + STALL_FLOOR_S + 0.1)
    assert len(again) == 1


def test_a_group_driven_again_leaves_out_who_has_ended() -> None:
    d = driver()
    prefilled(d, 1, 2)
    d.frames(0.0)
    d.end([1])
    again, _ = d.overdue(1000.0)
    assert [[i.sequence for i in f.items] for f in again] == [[2]]
    assert ids(again[0]) == [[102]]


def test_known_tokens_are_replayed_many_at_a_time_and_only_the_last_one_wants_another() -> None:
    d = driver(chunk=4)
    d.admit(Prompt(1, (10, 11), 64, Sampling(), known=tuple(range(100, 120))))
    d.admit(Prompt(2, (12,), 64, Sampling(), known=(200, 201, 202)))
    seen: list[tuple[str, list[int], int, bool]] = []
    while len(seen) < 7 and (frames := d.frames(0.0)):
        for frame in frames:
            wanted = [i.wants_token for i in frame.items]
            seen.append((frame.kind, [i.sequence for i in frame.items], frame.tensors["x"].shape[1], any(wanted)))
            d.take(answer(frame), 0.1)
    assert seen == [
        ("prefill", [1], 2, False),
        ("prefill", [2], 1, False),
        ("replay", [1, 2], 2, False),
        ("decode", [2], 1, True),
        ("replay", [1], 16, False),
        ("replay", [1], 1, False),
        ("decode", [1], 1, True),
    ]


def test_what_is_computed_anew_keeps_every_stage_of_the_route_busy() -> None:
    d = driver(chunk=4, stages=2)
    d.admit(Prompt(1, tuple(range(12)), 64, Sampling(), known=tuple(range(100, 150))))
    first, second = d.frames(0.0)
    assert [first.items[0].position, second.items[0].position] == [0, 4], "no chunk waits for an answer"
    d.take(answer(first), 0.1)
    d.take(answer(second), 0.1)
    third, replay, another = d.frames(0.1)
    assert [f.kind for f in (third, replay, another)] == ["prefill", "replay", "replay"]
    assert [f.items[0].position for f in (third, replay, another)] == [8, 12, 28]
    assert d.frames(0.1) == [], "as many frames as stages, and no more"
    d.take(answer(another), 0.2)
    assert d.written(1) is None, "two more tokens are known and not written yet"


def test_new_prompts_are_not_hurried() -> None:
    d = driver(chunk=4, stages=2)
    d.admit(prompt(1, 12))
    assert len(d.frames(0.0)) == 1


def test_tokens_that_are_prefilled_count_as_said() -> None:
    d = driver(chunk=8)
    d.admit(Prompt(1, (10, 11, 100, 101, 102), 64, Sampling(), said=3))
    [frame] = d.frames(0.0)
    assert (frame.kind, ids(frame)) == ("prefill", [[10, 11, 100, 101, 102]])
    assert (frame.items[0].wants_token, frame.items[0].index) == (True, 3), "the fourth token is the next one"
    d.take(answer(frame), 0.1)
    d.go_on(1, 7)
    [step] = d.frames(0.1)
    assert (step.kind, step.items[0].position, step.items[0].index) == ("decode", 5, 4)


def test_the_chunks_of_the_prompt_that_is_due_first_go_first_and_end_where_they_would_have() -> None:
    d = driver(chunk=4)
    d.admit(Prompt(1, tuple(range(10, 20)), 64, Sampling(), urgency=Urgency(due=9.0)))
    [begun] = d.frames(0.0)
    d.admit(Prompt(2, tuple(range(30, 36)), 64, Sampling(), urgency=Urgency(due=1.0)))
    d.take(answer(begun), 0.1)
    seen = []
    while frames := d.frames(0.2):
        for frame in frames:
            seen.append((frame.items[0].sequence, frame.items[0].position, frame.items[0].count))
            d.take(answer(frame), 0.3)
    assert seen == [(2, 0, 4), (2, 4, 2), (1, 4, 4), (1, 8, 2)]


def test_where_not_all_fit_a_group_takes_those_whose_next_token_is_due_first() -> None:
    d = driver(depth=2)
    for sequence, pace_s in ((1, 9.0), (2, 0.1), (3, 9.0), (4, 0.2)):
        d.admit(Prompt(sequence, (10,), 64, Sampling(), urgency=Urgency(pace_s=pace_s)))
    while frames := d.frames(0.0):
        for frame in frames:
            d.take(answer(frame), 0.1)
    for sequence in (1, 2, 3, 4):
        d.go_on(sequence, 5)
    assert [sorted(i.sequence for i in frame.items) for frame in d.frames(1.0)] == [[2, 4], [1, 3]]


def test_a_frame_of_many_sequences_is_measured_once() -> None:
    d = driver()
    prefilled(d, 1, 2, 3)
    chunks = d.pace.chunk.calls
    [frame] = d.frames(1.0)
    d.take(answer(frame), 1.5)
    assert (d.pace.chunk.calls, d.pace.step.calls) == (chunks, 1)
    assert d.pace.step.seconds(3) == 0.5

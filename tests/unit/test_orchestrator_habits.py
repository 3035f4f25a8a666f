"""What requests lately were, from counters that only grow while a process lives."""

import pytest

from orchestrator.fold import CapacityReceived, DeploymentRemoved, fold
from orchestrator.habits import REQUESTS, TOKENS_MAX, Habit, learned
from profiler.objective import Demand
from schemas.capacity import Capacity, Service
from tests.trigger_world import CHAT, World


def beat(
    count: int, prompt: int, output: int, boot: str = "one", answered: int | None = None, said: int = 0
) -> Capacity:
    """`count` came that asked for so many tokens in all, and `answered` of the like ended with `said` tokens."""
    world = World(2, 0, noise=0)
    ended = count if answered is None else answered
    part = ended / count if count else 0.0
    counters = Service(
        deployment=CHAT,
        arrived=count,
        sized=count,
        sized_prompt_tokens=prompt,
        sized_max_tokens=output,
        answered=ended,
        answered_prompt_tokens=round(part * prompt),
        answered_max_tokens=round(part * output),
        prompt_tokens=round(part * prompt),
        output_tokens=said or round(part * output),
    )
    return world.heartbeat(world.names[0]).model_copy(update={"service": (counters,), "boot": boot})


def tokens(habit: Habit) -> tuple[float, float]:
    return habit.prompt_tokens, habit.output_tokens


def test_the_first_requests_are_the_habit() -> None:
    assert tokens(learned({}, None, beat(4, 40, 800))[CHAT]) == (10, 200)
    assert learned({}, None, beat(0, 0, 0)) == {}


def test_later_ones_change_it_by_their_number() -> None:
    old = {CHAT: Habit(10, 200, said=1.0)}
    one = learned(old, beat(4, 40, 800), beat(5, 140, 900))[CHAT]
    assert 10 < one.prompt_tokens < 15
    many = learned(old, beat(4, 40, 800), beat(4 + 10 * REQUESTS, 40 + 1000 * REQUESTS, 800 + 1000 * REQUESTS))[CHAT]
    assert many.prompt_tokens == pytest.approx(100, rel=0.01)
    assert learned(old, beat(4, 40, 800), beat(4, 40, 800)) == old


def test_a_process_that_is_new_counts_from_nothing() -> None:
    found = learned({CHAT: Habit(10, 200, said=1.0)}, beat(400, 4000, 80_000), beat(1, 50, 50, boot="two"))[CHAT]
    assert found.prompt_tokens > 10
    assert found.output_tokens < 200


def test_what_an_overload_turns_away_is_what_is_asked_all_the_same() -> None:
    """Of an overload those end that take little: with them alone as the habit, there would be none."""
    world = World(2, 0, noise=0)
    short = Service(deployment=CHAT, arrived=100, sized=100, sized_prompt_tokens=10_000, sized_max_tokens=5_000)
    ended = {"answered": 50, "answered_prompt_tokens": 5_000, "answered_max_tokens": 50}
    told = short.model_copy(update={**ended, "prompt_tokens": 5_000, "output_tokens": 50})
    capacity = world.heartbeat(world.names[0]).model_copy(update={"service": (told,)})
    assert tokens(learned({}, None, capacity)[CHAT]) == (100, 50)


def test_who_may_say_much_and_says_little_is_known_by_what_it_says() -> None:
    first = learned({}, None, beat(4, 40, 16_000, answered=0))
    assert first[CHAT].output_tokens == Demand.output_tokens, "nobody knows how much of it they will say"
    later = learned(first, beat(4, 40, 16_000, answered=0), beat(8, 80, 32_000, answered=4, said=400))[CHAT]
    assert later.output_tokens == pytest.approx(100)


def test_an_answer_from_a_kept_beginning_still_has_something_to_compute() -> None:
    kept = Service(deployment=CHAT, sized=3, sized_prompt_tokens=300, sized_max_tokens=30, answered=3)
    told = kept.model_copy(update={"answered_prompt_tokens": 300, "answered_max_tokens": 30, "output_tokens": 30})
    world = World(2, 0, noise=0)
    capacity = world.heartbeat(world.names[0]).model_copy(update={"service": (told,)})
    assert tokens(learned({}, None, capacity)[CHAT]) == (1, 10)


def test_a_count_that_cannot_be_is_not_the_habit() -> None:
    assert tokens(learned({}, None, beat(1, 1 << 40, 1 << 40))[CHAT]) == (TOKENS_MAX, TOKENS_MAX)
    lies = Service(
        deployment=CHAT, sized=1, sized_prompt_tokens=10, sized_max_tokens=10, answered=1, output_tokens=1 << 40
    )
    world = World(2, 0, noise=0)
    capacity = world.heartbeat(world.names[0]).model_copy(update={"service": (lies,)})
    assert tokens(learned({}, None, capacity)[CHAT]) == (10, 10)


def test_the_last_requests_of_a_deployment_that_was_removed_bring_nothing_back() -> None:
    world = World(2, 0, noise=0)
    before = fold(world.snapshot, CapacityReceived(beat(4, 40, 800).model_copy(update={"sequence": 98})), world.now)
    assert CHAT in before.habits
    assert CHAT in before.arrivals
    removed = fold(before, DeploymentRemoved(CHAT), world.now)
    last = beat(9, 90, 900).service[0].model_copy(update={"met": 9})
    later = beat(9, 90, 900).model_copy(update={"service": (last,), "sequence": 99})
    after = fold(removed, CapacityReceived(later), world.now)
    assert (after.habits, after.arrivals, after.burns) == ({}, {}, {})

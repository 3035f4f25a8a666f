"""What requests lately were, from counters that only grow while a process lives."""

import pytest

from orchestrator.fold import CapacityReceived, DeploymentRemoved, fold
from orchestrator.habits import REQUESTS, TOKENS_MAX, Habit, learned
from schemas.capacity import Capacity, Service
from tests.trigger_world import CHAT, World


def beat(answered: int, prompt: int, output: int, boot: str = "one") -> Capacity:
    world = World(2, 0, noise=0)
    counters = Service(deployment=CHAT, answered=answered, prompt_tokens=prompt, output_tokens=output)
    return world.heartbeat(world.names[0]).model_copy(update={"service": (counters,), "boot": boot})


def test_the_first_requests_are_the_habit() -> None:
    assert learned({}, None, beat(4, 40, 800))[CHAT] == Habit(10, 200)
    assert learned({}, None, beat(0, 0, 0)) == {}


def test_later_ones_change_it_by_their_number() -> None:
    old = {CHAT: Habit(10, 200)}
    one = learned(old, beat(4, 40, 800), beat(5, 140, 900))[CHAT]
    assert 10 < one.prompt_tokens < 15
    many = learned(old, beat(4, 40, 800), beat(4 + 10 * REQUESTS, 40 + 1000 * REQUESTS, 800 + 1000 * REQUESTS))[CHAT]
    assert many.prompt_tokens == pytest.approx(100, rel=0.01)
    assert learned(old, beat(4, 40, 800), beat(4, 40, 800)) == old


def test_a_process_that_is_new_counts_from_nothing() -> None:
    found = learned({CHAT: Habit(10, 200)}, beat(400, 4000, 80_000), beat(1, 50, 50, boot="two"))[CHAT]
    assert found.prompt_tokens > 10
    assert found.output_tokens < 200


def test_an_answer_from_a_kept_beginning_still_has_something_to_compute() -> None:
    assert learned({}, None, beat(3, 0, 30))[CHAT] == Habit(1, 10)


def test_a_count_that_cannot_be_is_not_the_habit() -> None:
    assert learned({}, None, beat(1, 1 << 40, 1 << 40))[CHAT] == Habit(TOKENS_MAX, TOKENS_MAX)


def test_the_last_requests_of_a_deployment_that_was_removed_bring_nothing_back() -> None:
    world = World(2, 0, noise=0)
    before = fold(world.snapshot, CapacityReceived(beat(4, 40, 800).model_copy(update={"sequence": 98})), world.now)
    assert CHAT in before.habits
    removed = fold(before, DeploymentRemoved(CHAT), world.now)
    last = Service(deployment=CHAT, answered=9, prompt_tokens=90, output_tokens=900, met=9)
    later = beat(9, 90, 900).model_copy(update={"service": (last,), "sequence": 99})
    after = fold(removed, CapacityReceived(later), world.now)
    assert (after.habits, after.burns) == ({}, {})

"""How often requests arrive, from counters that only grow while a process lives."""

from datetime import timedelta

import numpy as np
import pytest

from orchestrator.arrivals import LEAST, MOST, PEAK, Arrivals, arrived
from schemas.capacity import Capacity, Service
from tests.trigger_world import CHAT, START, World

WORLD = World(2, 0, noise=0)
SECOND = timedelta(seconds=1)


def beat(count: int, boot: str = "one") -> Capacity:
    told = (Service(deployment=CHAT, arrived=count),)
    return WORLD.heartbeat(WORLD.names[0]).model_copy(update={"service": told, "boot": boot})


def told(counts: list[int]) -> Arrivals:
    """After a heartbeat a second that told of so many more each time."""
    known = Arrivals(START)
    for second, count in enumerate(counts, start=1):
        if count:
            known = known.more(count, START + second * SECOND)
    return known


def rate(counts: list[int], quiet_s: float = 0.0) -> float:
    return told(counts).per_s(START + (len(counts) + quiet_s) * SECOND)


def test_a_steady_rate_is_found_whatever_it_is() -> None:
    for per_s in (1, 4, 36):
        assert rate([per_s] * 120) == pytest.approx(per_s)


def test_a_rate_that_changed_is_that_of_the_time_since_as_soon_as_chance_does_not_explain_it() -> None:
    assert rate([12] * 60 + [36] * 5) == pytest.approx(36)
    assert rate([12] * 60 + [36] * 20 + [12] * 5) == pytest.approx(12)
    assert 1 < rate([1] * 60 + [3] * 5) < 2, "of five seconds of few nobody knows"
    assert rate([1] * 60 + [3] * 40) == pytest.approx(3)


@pytest.mark.parametrize("mean", [1.0, 4.0, 36.0])
def test_what_arrives_at_random_is_mostly_a_minutes_mean(mean: float) -> None:
    rng = np.random.default_rng(0)
    found = [rate([int(n) for n in rng.poisson(mean, 100)]) for _ in range(400)]
    assert np.mean(found) == pytest.approx(mean, rel=0.05)
    assert np.std(found) / mean < 1.5 / np.sqrt(MOST.total_seconds() * mean)


def test_a_first_request_is_no_rate_and_a_silence_brings_it_down() -> None:
    assert rate([1]) == 1 / LEAST.total_seconds()
    assert rate([12] * 60, quiet_s=30) < 6
    assert rate([12] * 60, quiet_s=MOST.total_seconds() + 5) == 0.0
    assert Arrivals(START).per_s(START) == 0.0


def test_a_peak_is_remembered_for_as_long_as_load_may_come_back() -> None:
    known = told([4] * 60 + [12] * 30 + [4] * 60)
    end = START + 150 * SECOND
    assert known.peak_per_s(end) == pytest.approx(12)
    assert known.per_s(end) == pytest.approx(4)
    assert known.peak_per_s(end + PEAK) == 0.0
    assert len(known.highs) < 60, "what was lower than a later one is forgotten"


def test_the_counts_of_several_ingresses_add_up() -> None:
    known: dict[str, Arrivals] = {}
    before: dict[str, Capacity] = {}
    now = START
    for second in range(60):
        for offset, boot in ((0.1, "one"), (0.6, "two")):
            now = START + timedelta(seconds=second + offset)
            later = beat(5 * second, boot)
            known = dict(arrived(known, before.get(boot), later, {}, now))  # type: ignore[arg-type]
            before[boot] = later
    assert known[CHAT].per_s(now) == pytest.approx(10, rel=0.15)


def test_counting_begins_where_a_node_is_first_heard_and_a_new_process_counts_from_nothing() -> None:
    assert arrived({}, None, beat(500), {}, START) == {}
    again = arrived({}, beat(500), beat(5, boot="two"), {}, START)
    assert again[CHAT].per_s(START) == 5 / LEAST.total_seconds()
    assert arrived({}, beat(500), beat(400), {}, START) == {}, "a counter that goes back tells nothing"


def test_a_first_request_after_a_while_is_known_to_be_the_only_one() -> None:
    now = START + timedelta(seconds=50)
    assert arrived({}, beat(0), beat(1), {CHAT: START}, now)[CHAT].per_s(now) == pytest.approx(1 / 50, rel=0.05)

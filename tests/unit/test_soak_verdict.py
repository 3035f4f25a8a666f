"""What a soak concludes from samples: growth, what is left, what hung, and accounts that do not add up."""

import random

import pytest

from benchmarks.soak.report import role
from benchmarks.soak.verdict import (
    HOUR_S,
    Fault,
    Request,
    account,
    grows,
    left_over,
    lost,
    stuck,
    trend,
    windows,
)

MIB = 2**20


def lives(
    per_hour: float, *, noise: float, seed: int, count: int = 6, points: int = 10
) -> dict[str, list[tuple[float, float]]]:
    """Processes that each begin somewhere else and grow so much an hour."""
    draw = random.Random(seed)
    found = {}
    for life in range(count):
        begin, base = life * 600.0, draw.uniform(100, 140) * MIB
        at = [begin + 60.0 * n for n in range(points)]
        found[str(life)] = [(t, base + per_hour * (t - begin) / HOUR_S + draw.gauss(0, noise)) for t in at]
    return found


def test_a_slope_without_noise_is_found_whatever_lives_begin_with() -> None:
    found = trend(lives(50 * MIB, noise=0, seed=1))
    assert found is not None
    assert found.per_hour == pytest.approx(50 * MIB)
    assert found.low == pytest.approx(50 * MIB)
    assert found.high == pytest.approx(50 * MIB)
    assert (found.points, found.lives) == (60, 6)


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_is_told_from_noise(seed: int) -> None:
    leaks = trend(lives(60 * MIB, noise=0.3 * MIB, seed=seed))
    assert leaks is not None
    assert leaks.per_hour == pytest.approx(60 * MIB, rel=0.05)
    assert grows(leaks, 8 * MIB).startswith("missed")


def test_what_does_not_grow_is_rarely_called_a_leak() -> None:
    verdicts = [grows(trend(lives(0, noise=0.3 * MIB, seed=seed)), 8 * MIB) for seed in range(200)]
    assert verdicts.count("met") > 150
    assert sum(verdict.startswith("missed") for verdict in verdicts) <= 2
    inside = [found for seed in range(200) if (found := trend(lives(0, noise=MIB, seed=seed)))]
    assert 0.9 <= sum(one.low <= 0 <= one.high for one in inside) / 200 <= 1.0


def test_one_outlier_changes_little() -> None:
    series = lives(0, noise=0, seed=3)
    at, value = series["0"][4]
    series["0"][4] = (at, value + 500 * MIB)
    found = trend(series)
    assert found is not None
    assert found.per_hour == 0


def test_few_samples_and_wide_ones_say_nothing() -> None:
    assert trend({"a": [(0.0, 1.0), (60.0, 9.0)]}) is None
    assert trend({}) is None
    assert grows(None, 1) == "too few samples"
    assert grows(trend(lives(0, noise=50 * MIB, seed=4)), MIB) == "not shown either way"


def test_a_constant_has_no_spread() -> None:
    found = trend({"a": [(float(n), 7.0) for n in range(20)]})
    assert found is not None
    assert (found.per_hour, found.low, found.high, found.baseline) == (0, 0, 0, 7)
    assert grows(found, 0) == "met"


def test_a_window_is_one_point() -> None:
    samples = [(0.0, 5.0), (10.0, 1.0), (12.0, 9.0), (14.0, 2.0), (30.0, 7.0)]
    assert windows(samples, [(9, 15), (16, 20), (25, 35)]) == [(12, 2), (30, 7)]


def test_what_is_left_is_what_there_is_more_of() -> None:
    assert left_over({"a": 1, "b": 5}, {"a": 3, "b": 4, "c": 1}) == {"a": 2, "c": 1}
    assert left_over({"a": 1}, {"a": 3}, slack=2) == {}


def asked(name: str, began: float, ended: float | None, outcome: str = "output", meant: str = "output") -> Request:
    return Request(name, "sum", began, ended, outcome, meant)


def test_a_request_is_stuck_only_where_no_fault_explains_it() -> None:
    fault = Fault("agent-hung", at=100, over=140)
    quick, slow = asked("quick", 10, 15), asked("slow", 10, 45)
    through, late = asked("through", 99, 165), asked("late", 99, 175)
    during, never = asked("during", 101, 139), asked("never", 300, None, "not ended")
    found = stuck([quick, slow, through, late, during, never], [fault], 30, now=400)
    assert [said.split()[1] for said in found] == ["slow", "late", "never"]
    assert stuck([never], [fault], 30, now=320) == ()


def test_accepted_requests_end_as_they_were_meant_to() -> None:
    requests = [
        asked("fine", 0, 1),
        asked("wrong", 0, 1, "wrong"),
        asked("refused", 0, 1, "overloaded"),
        asked("broken", 0, 1, "timeout"),
        asked("stopped", 0, 1, "cancelled", "cancelled"),
        asked("too quick", 0, 1, "output", "cancelled"),
        asked("gone", 0, 1, "cancelled", "left"),
    ]
    found = lost(requests, {"fine", "broken", "stopped", "too quick", "gone"})
    assert [said.split()[1].rstrip(":") for said in found] == ["wrong", "broken", "gone"]


def test_every_accepted_request_is_in_the_trail_as_it_ended() -> None:
    requests = [asked("a", 0, 1), asked("b", 0, 1), asked("c", 0, 1, "cancelled", "cancelled")]
    trail = {"a": ["output", "output"], "b": ["cancelled"], "d": ["output"]}
    found = account(requests, {"a", "b", "c"}, trail)
    assert found.accepted == 3
    assert found.missing == ("c",)
    assert found.contradicted == ("b",)
    assert found.repeated == 1


def test_processes_that_are_alike_are_one_series() -> None:
    assert [role(name) for name in ("n0", "n12", "orchestrator", "orchestrator-1", "gateway", "nats-server")] == [
        "agents", "agents", "orchestrators", "orchestrators", "gateway", "nats-server",
    ]  # fmt: skip

"""Intervals over paired seeds, and what they allow to be said."""

import numpy as np
import pytest

from simulator.statistics import PAIRS_MIN, mean_interval, paired_difference

SEEDS = np.random.default_rng(5).normal(100, 20, 30).tolist()


def test_the_difference_of_equal_samples_is_zero_and_not_significant() -> None:
    same = paired_difference(SEEDS, SEEDS, seed=1)
    assert (same.mean, same.low, same.high, same.count) == (0, 0, 0, 30)
    assert not same.excludes_zero


def test_a_constant_shift_excludes_zero_however_much_the_seeds_vary() -> None:
    shifted = paired_difference([value + 0.5 for value in SEEDS], SEEDS, seed=1)
    assert shifted.excludes_zero
    assert (shifted.low, shifted.mean, shifted.high) == pytest.approx((0.5, 0.5, 0.5))


def test_noise_without_a_shift_holds_zero_about_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        noise = rng.normal(0, 1, 30)
        held += not paired_difference(noise.tolist(), [0.0] * 30, seed=1, draws=2000).excludes_zero
    assert 0.88 <= held / 200 <= 0.99


def test_the_interval_is_about_as_wide_as_the_normal_one_where_that_holds() -> None:
    found = mean_interval(SEEDS, seed=2)
    half = 1.96 * float(np.std(SEEDS)) / 30**0.5
    assert found.mean == pytest.approx(float(np.mean(SEEDS)))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_the_order_of_the_pairs_matters_and_not_the_spread_of_each_side() -> None:
    other = [value - 1 for value in SEEDS]
    paired = paired_difference(SEEDS, other, seed=1)
    crossed = paired_difference(SEEDS, other[::-1], seed=1)
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.high - paired.low < 1e-9
    assert crossed.high - crossed.low > 1


def test_intervals_are_the_same_each_time_for_one_seed() -> None:
    assert mean_interval(SEEDS, seed=3) == mean_interval(SEEDS, seed=3)
    assert mean_interval(SEEDS, seed=3) != mean_interval(SEEDS, seed=4)


@pytest.mark.parametrize(("count", "told"), [(1, False), (PAIRS_MIN - 1, False), (PAIRS_MIN, True)])
def test_too_few_seeds_tell_nothing(count: int, told: bool) -> None:
    assert paired_difference([2.0] * count, [1.0] * count, seed=0).excludes_zero is told


def test_an_interval_never_leaves_out_its_mean() -> None:
    for value in (0.1, 1 / 3, 1e9 + 0.1):
        found = mean_interval([value] * 7, seed=0)
        assert found.low <= found.mean <= found.high

"""What benchmarks say of rounds in which two ways are held against each other."""

import random

import pytest

from benchmarks.paired import median_interval


@pytest.mark.parametrize(
    ("count", "first", "last"), [(1, 1, 1), (5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15), (40, 14, 27)]
)
def test_the_interval_of_a_median_lies_between_the_ranks_of_the_sign_test(count: int, first: int, last: int) -> None:
    """Ranks as statisticians tabulate them; fewer than six rounds say only where they all lie."""
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert median_interval(values) == (first, last)


def test_the_interval_holds_the_median_in_19_of_20_cases() -> None:
    held = 0
    for seed in range(2000):
        drawn = random.Random(seed)
        low, high = median_interval([drawn.lognormvariate(0.0, 1.0) for _ in range(15)])
        held += low <= 1.0 <= high
    assert held / 2000 >= 0.95

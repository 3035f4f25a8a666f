"""PURE: what rounds of two ways, each next to the other, say of the one over the other."""

import math
from collections.abc import Sequence

CHANCE = 0.05


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which of `values` the median of what they are drawn from lies, but for a chance of 5 % at the most. Of
    fewer than six that is nobody's to say, and they are all between the two."""
    ordered, count, beyond = sorted(values), len(values), 0.0
    for rank in range(count // 2):
        beyond += 2 * math.comb(count, rank) / 2**count
        if beyond > CHANCE:
            return ordered[max(rank - 1, 0)], ordered[count - max(rank, 1)]
    return ordered[0], ordered[-1]

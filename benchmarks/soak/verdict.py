"""What a soak shows: what grows, what is left over, what hung, and what nobody accounts for. Functions of values."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

Z = 1.96
"""Of a normal distribution: 95 %, two-sided."""
POINTS_MIN = 8
"""With fewer there is nothing to say about a slope."""
HOUR_S = 3600.0

Series = Mapping[str, Sequence[tuple[float, float]]]
"""By life of a process: (second, value). What a life begins with says nothing about another's."""


@dataclass(frozen=True)
class Trend:
    """How fast something grows, an hour, with an interval of 95 %."""

    per_hour: float
    low: float
    high: float
    baseline: float
    """The median of all values."""
    points: int
    lives: int


def trend(series: Series) -> Trend | None:
    """Sen's slope over the pairs of each life, taken together as Hirsch and Slack's seasons are; its interval from the
    variance of Kendall's S, summed over lives (Gilbert 1987, 16.4 and 17.2). None where there are too few points."""
    lives = {life: sorted(points) for life, points in series.items() if len(points) > 1}
    slopes = sorted(_slopes(lives.values()))
    points = sum(len(found) for found in lives.values())
    if points < POINTS_MIN or not slopes:
        return None
    spread = Z * math.sqrt(sum(_variance([value for _, value in found]) for found in lives.values()))
    low, high = ((len(slopes) - spread) / 2, (len(slopes) + spread) / 2)
    values = sorted(value for found in lives.values() for _, value in found)
    return Trend(
        per_hour=HOUR_S * _at(slopes, (len(slopes) - 1) / 2),
        low=HOUR_S * _at(slopes, low - 0.5),
        high=HOUR_S * _at(slopes, high - 0.5),
        baseline=_at(values, (len(values) - 1) / 2),
        points=points,
        lives=len(lives),
    )


def _slopes(lives: Iterable[Sequence[tuple[float, float]]]) -> Iterator[float]:
    for points in lives:
        for (before, low), (after, high) in combinations(points, 2):
            if after > before:
                yield (high - low) / (after - before)


def _variance(values: Sequence[float]) -> float:
    """Of Kendall's S where nothing grows, ties counted."""
    ties = Counter(values).values()
    return sum(n * (n - 1) * (2 * n + 5) * sign for sign, ns in ((1, [len(values)]), (-1, ties)) for n in ns) / 18


def _at(ranked: Sequence[float], place: float) -> float:
    """Between the two nearest places; the outermost beyond them."""
    place = min(max(place, 0.0), len(ranked) - 1.0)
    below = math.floor(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (place - below) * (ranked[above] - ranked[below])


def grows(found: Trend | None, bound: float) -> str:
    """Whether it grows by more than `bound` an hour, as far as the interval says."""
    if found is None:
        return "too few samples"
    if found.low > bound:
        return f"missed: grows by {found.per_hour:.3g} an hour"
    return "met" if found.high <= bound else "not shown either way"


def left_over(before: Mapping[str, float], after: Mapping[str, float], slack: float = 0.0) -> dict[str, float]:
    """What there is more of after than before, by name, beyond `slack`."""
    return {name: value - before.get(name, 0) for name, value in after.items() if value > before.get(name, 0) + slack}


@dataclass(frozen=True)
class Request:
    """One request as whoever asked saw it; times are those of `time.monotonic`."""

    request_id: str
    kind: str
    began: float
    ended: float | None
    outcome: str
    """`output`, `wrong`, `left`, or the code of the error that ended it."""
    meant: str = "output"
    """How it was to end: what was to be cancelled may end in output all the same."""


@dataclass(frozen=True)
class Fault:
    """One that was done: from when, and when all was whole again."""

    name: str
    at: float
    over: float


def stuck(requests: Iterable[Request], faults: Sequence[Fault], bound_s: float, now: float) -> tuple[str, ...]:
    """Requests that took longer than `bound_s`, counted from where the last fault that they met was over."""
    found = []
    for one in requests:
        ended = now if one.ended is None else one.ended
        since = max([one.began, *(fault.over for fault in faults if fault.at < ended and fault.over < ended)])
        met = any(fault.at < ended <= fault.over for fault in faults)
        if not met and ended - since > bound_s:
            how = "never ended" if one.ended is None else f"ended after {ended - since:.1f} s"
            found.append(f"{one.kind} {one.request_id} {how}")
    return tuple(found)


def lost(requests: Iterable[Request], accepted: Collection[str]) -> tuple[str, ...]:
    """Requests that were accepted and did not end as they were meant to, and answers that are wrong."""
    found = []
    for one in requests:
        if one.outcome == "wrong":
            found.append(f"{one.kind} {one.request_id}: a wrong answer")
        elif one.outcome not in ("output", one.meant) and one.request_id in accepted:
            found.append(f"{one.kind} {one.request_id}: {one.outcome}")
    return tuple(found)


@dataclass(frozen=True)
class Account:
    """What the audit trail says of accepted requests."""

    accepted: int
    missing: tuple[str, ...]
    """Accepted, and their end is not in the trail."""
    contradicted: tuple[str, ...]
    """Answered, and the trail has an error alone."""
    repeated: int
    """Whose end is there more than once: a successor answered for them too."""


def account(requests: Iterable[Request], accepted: Collection[str], ends: Mapping[str, Sequence[str]]) -> Account:
    """`ends`: of each request how the trail says it ended, as often as it does: `output` or an error's code."""
    answered = {one.request_id for one in requests if one.outcome == "output"}
    return Account(
        accepted=len(accepted),
        missing=tuple(sorted(one for one in accepted if one not in ends)),
        contradicted=tuple(sorted(one for one in answered & ends.keys() if "output" not in ends[one])),
        repeated=sum(len(ends.get(one, ())) > 1 for one in accepted),
    )


def windows(samples: Sequence[tuple[float, float]], quiet: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A point for each quiet window in which there are samples: its middle, and their median. Samples of one window are
    too alike to count as so many."""
    found = []
    for begin, end in quiet:
        inside = sorted(value for at, value in samples if begin <= at <= end)
        if inside:
            found.append(((begin + end) / 2, _at(inside, (len(inside) - 1) / 2)))
    return found

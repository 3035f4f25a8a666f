"""What a run under a fault amounts to: requests lost, the longest silence, and the verdict. Functions of values."""

import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.faults.load import Asked


@dataclass(frozen=True)
class Seen:
    """What somebody who did something to the cluster can tell; times are those of `time.monotonic`."""

    at: float
    """When it was done."""
    affected: tuple[Asked, ...]
    """The streams that ran then."""
    until: float
    """By when each of them went on."""
    since: float | None = None
    """From when a bound counts, where that is later."""
    took_s: float | None = None
    """What the bound is about, where it is not how soon tokens came again."""
    broken: tuple[str, ...] = ()
    """Promises broken that no clock tells."""
    repeated: int = 0
    """Tokens that one who had hung said again, as they had been said."""
    step: str | None = None
    """Of the protocol, at which it was done."""
    told: Mapping[str, float] = field(default_factory=dict)
    """Further figures, by name."""


@dataclass(frozen=True)
class Run:
    """One run."""

    resume_s: float
    """From the fault to the end of the longest wait for a token after it, of the stream that waited last."""
    gap_s: float
    """The longest time between two tokens of one stream, from the fault on."""
    median_gap_s: float
    """Before it."""
    took_s: float | None
    tokens: int
    """That the longest of the streams had when it was done: as many are replayed where its caches are gone."""
    requests: int
    lost: tuple[str, ...]
    """How each accepted request ended that did not end in the right tokens."""
    refused: int
    """Requests that were never accepted, and so may be asked again."""
    broken: tuple[str, ...]
    repeated: int
    step: str | None
    told: Mapping[str, float]

    def breaking(self, more: Iterable[str]) -> "Run":
        """The same run, with further promises broken."""
        return replace(self, broken=(*self.broken, *more))


def waits(one: Asked) -> list[tuple[float, float]]:
    """(begin, end) of each wait for a token of a stream; the first is the one for its first token, and where it ended
    in an error the last one was in vain."""
    times = [one.began, *one.arrivals, *([one.ended] if one.ended is not None and one.error is not None else [])]
    return list(itertools.pairwise(times))


def resumed_s(affected: Sequence[Asked], since: float, until: float) -> float:
    """From `since` to the end of the longest wait, begun before `until`, of whichever stream that ended last."""
    found = [[(end - begin, end) for begin, end in waits(one) if end >= since and begin <= until] for one in affected]
    return max((max(mine)[1] - since for mine in found if mine), default=0.0)


def loss(one: Asked, accepted: Collection[str]) -> str | None:
    """How an accepted request was lost, if it was."""
    expected = one.question.expected
    count = len(one.ids)
    if tuple(one.ids) != expected[:count]:
        return f"a wrong token among the first {count}"
    if one.ended is None:
        return f"no end after {count} tokens"
    if one.error is None:
        return None if count == len(expected) else f"ended after {count} tokens"
    is_accepted = bool(one.ids) or one.request_id in accepted
    return f"{one.error.code} after {count} tokens: {one.error.message}" if is_accepted else None


def summed_up(asked: Sequence[Asked], accepted: Collection[str], seen: Seen) -> Run:
    """A run, of all that was asked and of what was accepted of it."""
    between = [wait for one in asked for wait in waits(one)[1:]]
    since = seen.at if seen.since is None else seen.since
    losses = [loss(one, accepted) for one in asked]
    return Run(
        resume_s=resumed_s(seen.affected, since, seen.until),
        gap_s=max((end - begin for begin, end in between if end >= seen.at), default=0.0),
        median_gap_s=statistics.median([end - begin for begin, end in between if end < seen.at]),
        took_s=seen.took_s,
        tokens=max(sum(at < seen.at for at in one.arrivals) for one in seen.affected),
        requests=len(asked),
        lost=tuple(how for how in losses if how is not None),
        refused=sum(one.error is not None and how is None for one, how in zip(asked, losses, strict=True)),
        broken=seen.broken,
        repeated=seen.repeated,
        step=seen.step,
        told=seen.told,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The least of `values` that `share` of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]

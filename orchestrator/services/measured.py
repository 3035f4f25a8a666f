"""PURE: how much comes of each stream, by what came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, sqrt

from orchestrator.services.problem import Stream
from schemas.base import NodeId

FAST_SLOTS = 40.0
"""Over so many slots is measured how often a task is asked for, by whomever."""
SLOW_SLOTS = 400.0
"""And over so many who asks for it: of one stream little comes in a short time."""

SIGMAS = 3.0
"""What comes is taken for so many standard deviations more than was measured: too little costs more than too much."""

StreamKey = tuple[str, NodeId]
"""A task, and where its requests come in."""


@dataclass(frozen=True)
class Rates:
    """Requests a slot."""

    tasks: Mapping[str, float]
    streams: Mapping[StreamKey, float]

    def after(self, arrived: Mapping[StreamKey, int], slots: float) -> "Rates":
        """Once so many more have come in so many slots."""
        counts: dict[str, int] = {}
        for (task, _), count in arrived.items():
            counts[task] = counts.get(task, 0) + count
        fast, slow = exp(-slots / FAST_SLOTS), exp(-slots / SLOW_SLOTS)
        return Rates(
            {task: fast * rate + (1.0 - fast) * counts.get(task, 0) / slots for task, rate in self.tasks.items()},
            {key: slow * rate + (1.0 - slow) * arrived.get(key, 0) / slots for key, rate in self.streams.items()},
        )

    def knowing(self, streams: Sequence[Stream]) -> "Rates":
        """With streams of which nothing came yet."""
        return Rates(
            {**dict.fromkeys((one.task for one in streams), 0.0), **self.tasks},
            {**{(one.task, one.at): 0.0 for one in streams}, **self.streams},
        )

    def of(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
        """The streams with what comes of each now; those of which nothing comes are left out."""
        sums: dict[str, float] = {}
        for (task, _), rate in self.streams.items():
            sums[task] = sums.get(task, 0.0) + rate
        high = {task: rate + SIGMAS * sqrt(rate / FAST_SLOTS) for task, rate in self.tasks.items()}
        found = (
            replace(one, per_slot=high[one.task] * self.streams[one.task, one.at] / sums[one.task])
            for one in streams
            if sums[one.task] > 0.0
        )
        return tuple(one for one in found if one.per_slot > 0.0)


def expected(streams: Sequence[Stream]) -> Rates:
    """Before anything was measured: what is said of them."""
    tasks: dict[str, float] = {}
    for one in streams:
        tasks[one.task] = tasks.get(one.task, 0.0) + one.per_slot
    return Rates(tasks, {(one.task, one.at): one.per_slot for one in streams})

"""PURE: the requests that wait for a slot, in the order in which they get one."""

from bisect import insort
from collections.abc import Iterator

from agent.intake import Job

Place = tuple[int, float, float, int]


class Waiting:
    """What was interrupted first (what had begun before what had not), then by urgency, then by arrival.

    A request keeps the place that it had when it came. Nobody starves: see `agent.urgency`.
    """

    def __init__(self) -> None:
        self._line: list[tuple[Place, Job]] = []
        self._came = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Job]:
        return iter([job for _, job in self._line])

    def __contains__(self, job: Job) -> bool:
        return any(other is job for _, other in self._line)

    @property
    def first(self) -> Job:
        return self._line[0][1]

    def add(self, job: Job) -> None:
        """It waits from now on, once."""
        if job not in self:
            insort(self._line, (self._place(job), job), key=lambda entry: entry[0])
            self._came += 1

    def remove(self, job: Job) -> None:
        """It waits no more, if it did."""
        self._line = [entry for entry in self._line if entry[1] is not job]

    def before(self, job: Job) -> list[Job]:
        """Those that would go before it if it came now."""
        place = self._place(job)
        return [other for at, other in self._line if at < place]

    def _place(self, job: Job) -> Place:
        rank = 2 if job.interrupted_at is None else 0 if job.has_begun else 1
        return rank, job.urgency.due, job.meter.arrived, self._came

"""PURE: what ingresses count of pipelines between heartbeats: what arrives, what is late, what services take."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.services.measured import StreamKey
from schemas.base import DeploymentName, NodeId
from schemas.capacity import Capacity, StepCount, TaskCount
from schemas.pipeline import Pipeline

ANSWERS_MIN = 20
"""Fewer say little of what a service takes."""
ANSWERS_KEPT = 400.0
"""As many, at most, weigh on what comes next: a service that takes longer now is noticed after some hundred answers."""

Counter = tuple[NodeId, str, str]
"""A node, its process, and what is counted there."""


@dataclass(frozen=True)
class Moments:
    """What a service took on a node."""

    answers: float
    mean_ms: float
    squared_ms: float
    """The mean of the squares."""

    @property
    def variation(self) -> float:
        """The squared coefficient of variation."""
        return max(0.0, self.squared_ms / self.mean_ms**2 - 1.0) if self.mean_ms > 0.0 else 0.0

    def and_then(self, answers: int, sum_ms: float, sum_squared: float) -> "Moments":
        """With some more answers, of which the sums are known."""
        kept = min(self.answers, ANSWERS_KEPT)
        whole = kept + answers
        return Moments(whole, (kept * self.mean_ms + sum_ms) / whole, (kept * self.squared_ms + sum_squared) / whole)


NOTHING = Moments(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Seen:
    """What was counted so far, and what services take."""

    tasks: Mapping[Counter, TaskCount] = field(default_factory=dict)
    steps: Mapping[Counter, StepCount] = field(default_factory=dict)
    times: Mapping[tuple[str, NodeId], Moments] = field(default_factory=dict)
    """By service and node."""
    begun: bool = False
    """Whether there was a look before: what processes had counted until the first one says nothing of when."""

    def time(self, service: str, node: NodeId) -> Moments | None:
        """What a service takes on a node; None while too little was seen of it."""
        found = self.times.get((service, node))
        return found if found is not None and found.answers >= ANSWERS_MIN else None


@dataclass(frozen=True)
class Slot:
    """What came since the last look."""

    arrived: Mapping[StreamKey, int]
    missed: Mapping[str, int]
    """By task."""


def looked(
    seen: Seen,
    conductors: Mapping[NodeId, Capacity],
    name: DeploymentName,
    pipeline: Pipeline,
    present: frozenset[NodeId],
) -> tuple[Seen, Slot]:
    """What is new in the last heartbeats of those who conduct a pipeline; what anybody else says of it, or they of
    what it has not, counts for nothing. A process that is new since the first look began to count at 0."""
    tasks, steps, times = dict[Counter, TaskCount](), dict[Counter, StepCount](), dict(seen.times)
    arrived: dict[StreamKey, int] = {}
    missed: dict[str, int] = {}
    for node, capacity in conductors.items():
        for service in capacity.service:
            if service.deployment != name:
                continue
            for count in service.tasks or ():
                if count.task not in pipeline.tasks:
                    continue
                key = (node, capacity.boot, count.task)
                before = seen.tasks.get(key, TaskCount(task=count.task))
                tasks[key] = count
                if seen.begun:
                    came = max(0, count.arrived - before.arrived)
                    arrived[count.task, node] = arrived.get((count.task, node), 0) + came
                    missed[count.task] = missed.get(count.task, 0) + max(0, count.missed - before.missed)
            for step in service.steps or ():
                at = (step.service, NodeId(step.node))
                if step.service not in pipeline.services or step.node not in present:
                    continue
                key = (node, capacity.boot, f"{step.service} {step.node}")
                known = seen.steps.get(
                    key, StepCount(service=step.service, node=at[1], answers=0, compute_ms=0.0, compute_ms_squared=0.0)
                )
                steps[key] = step
                if (answers := step.answers - known.answers) > 0:
                    took, squared = (
                        step.compute_ms - known.compute_ms,
                        step.compute_ms_squared - known.compute_ms_squared,
                    )
                    times[at] = times.get(at, NOTHING).and_then(answers, max(0.0, took), max(0.0, squared))
    times = {at: one for at, one in times.items() if at[1] in present}
    return Seen(tasks, steps, times, begun=True), Slot(arrived, missed)

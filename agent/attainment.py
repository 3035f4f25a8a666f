"""What becomes of the requests of one deployment, and how they fare against its class: counters, and what counts.

A request is held to the looser of its own class and the deployment's, and to no target that the deployment does not
declare: nobody burns the deployment's error budget by asking for the impossible.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.generation import Generation
from agent.intake import Job
from agent.pipelinejob import PipelineJob
from schemas.base import DeploymentName, NodeId
from schemas.capacity import CloudCount, Service, StepCount, TaskCount
from schemas.errors import ErrorCode
from schemas.request import CloudUse, Usage
from schemas.slo import Slo

STEPS_MAX, TASKS_MAX = 1024, 64
"""A heartbeat holds no more; of services on nodes those that were met first are forgotten."""
TIMELY = frozenset({ErrorCode.DEADLINE_EXCEEDED, ErrorCode.DEADLINE_UNATTAINABLE})


@dataclass(slots=True)
class Attainment:
    """Since the process began."""

    counts: Counter[str] = field(default_factory=Counter)
    """By their names in `schemas.capacity.Service`."""
    tasks: dict[str, Counter[str]] = field(default_factory=dict)
    """Of a pipeline: likewise, by task."""
    steps: dict[tuple[str, str], StepCount] = field(default_factory=dict)
    """Of a pipeline: what its services took, by service and node."""
    cloud: CloudCount = field(default_factory=CloudCount)
    """What was put to a cloud."""

    def turned_away(self, task: str | None = None) -> None:
        """A request came that nobody read, for want of capacity."""
        self._count("arrived", task)

    def came(self, job: Job) -> None:
        """A request came that could be run, were there the capacity."""
        self._count("arrived", _task(job))
        if isinstance(job, Generation):
            self.counts.update(sized=1, sized_prompt_tokens=len(job.prompt), sized_max_tokens=job.max_tokens)

    def waits(self, promised: Slo | None, job: Job, now: float) -> None:
        """A request has not ended: it is counted as soon as it can only miss, and then no more. Whoever waited for its
        end would learn of an overload as late as those who queue in it get their turn."""
        if job.meter.late or promised is None:
            return
        waited_ms = 1e3 * (now - job.meter.arrived)
        first_ms = waited_ms if job.meter.first_token is None else 0.0
        if _misses(promised, job.slo, first_ms, 0.0, waited_ms):
            job.meter.late = True
            self._count("missed", _task(job))

    def ended(self, promised: Slo | None, job: Job, usage: Usage) -> None:
        """A request ended in output."""
        if isinstance(job, Generation) and usage.completion_tokens:
            self.counts.update(
                answered=1,
                answered_prompt_tokens=usage.prompt_tokens,
                answered_max_tokens=job.max_tokens,
                prompt_tokens=usage.prompt_tokens - usage.cached_tokens,
                output_tokens=usage.completion_tokens,
            )
        if job.meter.late or promised is None or not promised.promises:
            return
        first_ms = usage.total_ms if usage.ttft_ms is None else usage.ttft_ms
        missed = _misses(promised, job.slo, first_ms, usage.tpot_ms or 0.0, usage.total_ms)
        self._count("missed" if missed else "met", _task(job))

    def took(self, usage: Usage) -> None:
        """A request to a pipeline was answered by all of its services."""
        for step in usage.steps or ():
            for node in step.nodes:
                if len(self.steps) >= STEPS_MAX and (step.service, node) not in self.steps:
                    del self.steps[next(iter(self.steps))]
                known = self.steps.get((step.service, node))
                self.steps[step.service, node] = StepCount(
                    service=step.service,
                    node=NodeId(node),
                    answers=1 + (known.answers if known else 0),
                    compute_ms=step.compute_ms + (known.compute_ms if known else 0.0),
                    compute_ms_squared=step.compute_ms**2 + (known.compute_ms_squared if known else 0.0),
                )

    def asked_outside(self) -> None:
        """A cloud is asked for one."""
        self.cloud = self.cloud.model_copy(update={"asked": self.cloud.asked + 1})

    def answered_outside(self, use: CloudUse) -> None:
        """A cloud answered one."""
        self.cloud = self.cloud.model_copy(
            update={
                "answered": self.cloud.answered + 1,
                "total_ms": self.cloud.total_ms + use.total_ms,
                "cost": self.cloud.cost + use.cost,
            }
        )

    def refused(self, promised: Slo | None, own: Slo, code: ErrorCode, task: str | None = None) -> None:
        """A request of class `own` was refused: it counts where there was no capacity for it."""
        if code in (ErrorCode.OVERLOADED, ErrorCode.DEADLINE_UNATTAINABLE):
            self._failed(promised, own, code, task)

    def failed(self, promised: Slo | None, job: Job, code: ErrorCode) -> None:
        """A request that was accepted ended in an error."""
        if not job.meter.late:
            self._failed(promised, job.slo, code, _task(job))

    def _failed(self, promised: Slo | None, own: Slo, code: ErrorCode, task: str | None) -> None:
        if promised is None or not promised.promises or code is ErrorCode.CANCELLED:
            return
        deadline_ms = promised.deadline_ms
        if code in TIMELY and (deadline_ms is None or (own.deadline_ms or 0.0) < deadline_ms):
            return  # the deadline was the client's
        self._count("missed", task)

    def _count(self, what: str, task: str | None) -> None:
        self.counts[what] += 1
        if task is not None:
            self.tasks.setdefault(task, Counter())[what] += 1


def _task(job: Job) -> str | None:
    return job.task_name if isinstance(job, PipelineJob) else None


def _misses(promised: Slo, own: Slo, first_ms: float, tpot_ms: float, total_ms: float) -> bool:
    held_to = (
        (first_ms, promised.ttft_ms, own.ttft_ms),
        (tpot_ms, promised.tpot_ms, own.tpot_ms),
        (total_ms, promised.deadline_ms, own.deadline_ms),
    )
    return any(target is not None and ms > max(target, asked or 0.0) for ms, target, asked in held_to)


def services(
    attainments: Mapping[DeploymentName, Attainment], waiting: Mapping[DeploymentName, int]
) -> tuple[Service, ...]:
    """What a heartbeat says of every deployment of which any request was counted, or waits."""
    return tuple(
        _service(name, one, waiting.get(name, 0))
        for name, one in sorted(attainments.items())
        if one.counts or waiting.get(name)
    )


def _service(name: DeploymentName, one: Attainment, waiting: int) -> Service:
    tasks = tuple(TaskCount(task=task, **counts) for task, counts in sorted(one.tasks.items()))[:TASKS_MAX]
    steps = tuple(one.steps[key] for key in sorted(one.steps))
    cloud = one.cloud if one.cloud.asked else None
    return Service(
        deployment=name, waiting=waiting, **one.counts, tasks=tasks or None, steps=steps or None, cloud=cloud
    )

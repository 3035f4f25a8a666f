"""Requests of one deployment that a cloud answers, where the cluster cannot: when they are put to it, and what becomes
of them.

Such a request is in the journal like any other; a successor of this ingress puts it to the cloud anew, or runs it. What
comes back is kept and said as what a node's answer is. On the event loop.
"""

import asyncio
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from agent.cloudwire import Said, ask_of
from agent.generation import Generation
from agent.intake import Job
from agent.pipelinejob import PipelineJob
from agent.tensorjob import TensorJob
from schemas.audit import AuditKind
from schemas.deployment import Cloud
from schemas.errors import ErrorCode, ResplitError
from schemas.request import CloudUse, Request

if TYPE_CHECKING:
    from agent.served import Served

SHOWS_S = 3.0
"""A request that came for a cold model counts as one that waits for so long at least: a heartbeat tells of it, however
fast the cloud was."""

log = logging.getLogger(__name__)


class Fallback:
    """What of a deployment's requests is elsewhere."""

    def __init__(self, served: "Served") -> None:
        self._served = served
        self._chosen: dict[Job, str] = {}
        """New ones that the cluster would have refused, and why; they are not accepted yet."""
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._may_wait: set[Job] = set()
        """Those among them that could wait here as well."""
        self._failed: set[Job] = set()
        """Those that no cloud could answer, and that wait for the cluster again."""
        self._cold_at = -SHOWS_S

    @property
    def jobs(self) -> Collection[Job]:
        """Those that a cloud is asked for now."""
        return self._tasks.keys()

    @property
    def waiting(self) -> int:
        """How many count as if they waited for a cold model."""
        if self._served.runs.cold is None:
            return 0
        return len(self._tasks) or int(self._served.desk.now() < self._cold_at + SHOWS_S)

    def may_take(self, request: Request, *, sealed: bool, deadline_ms: float | None = None) -> bool:
        """Whether a request may leave the cluster, and somebody outside would take it now."""
        cloud, clouds = self._cloud, self._served.desk.clouds
        if cloud is None or clouds is None or sealed or request.edge_only:
            return False
        return clouds.may_ask(self._served.name, cloud, request, deadline_ms)

    def choose(self, job: Job, refusal: ResplitError) -> None:
        """The cluster would refuse a new request: raises that, unless a cloud takes it."""
        if not self._may_take(job):
            raise refusal
        self._chosen[job] = refusal.code.value

    def begin_chosen(self, job: Job) -> bool:
        """A request was accepted; whether it goes to the cloud."""
        why = self._chosen.pop(job, None)
        return why is not None and self._begin(job, why)

    def take_what_would_wait(self) -> None:
        """What waits for a cold model goes to the cloud, unless that is loaded as soon as the operator will wait."""
        cold, cloud, now = self._served.runs.cold, self._cloud, self._served.desk.now()
        if cold is None or cloud is None:
            return
        soon = cold.loads_s is not None and cold.loads_s <= cloud.waits_s
        for job in list(self._served.queue):
            if not (soon and now - job.meter.arrived <= cloud.waits_s) and self._may_take(job):
                self._served.queue.remove(job)
                self._cold_at = now
                self._may_wait.add(job)
                self._begin(job, "its model is not loaded")

    def forget(self, job: Job) -> None:
        """It has ended."""
        self._chosen.pop(job, None)
        self._failed.discard(job)
        self._may_wait.discard(job)
        if (task := self._tasks.pop(job, None)) is not None:
            task.cancel()

    @property
    def _cloud(self) -> Cloud | None:
        newest = self._served.runs.newest
        return None if newest is None else newest.plan.cloud

    def _may_take(self, job: Job) -> bool:
        if job in self._failed or isinstance(job, PipelineJob) or (isinstance(job, Generation) and job.owed):
            return False
        return self.may_take(job.request, sealed=job.reply.seal is not None, deadline_ms=job.slo.deadline_ms)

    def _begin(self, job: Job, why: str) -> bool:
        cloud, now = self._cloud, self._served.desk.now()
        if cloud is None:
            return False  # it may not leave any more
        job.meter.started = job.meter.started or now
        self._tasks[job] = asyncio.create_task(self._ask(job, cloud, why))
        return True

    async def _ask(self, job: Job, cloud: Cloud, why: str) -> None:
        served, clouds = self._served, self._served.desk.clouds
        assert clouds is not None, "a node without clouds takes no such request"
        served.desk.audit.record(
            AuditKind.CLOUD_ASKED,
            "a request leaves the cluster",
            deployment=served.name,
            request=job.request_id,
            cloud=cloud.name,
            model=cloud.model,
            why=why,
        )
        served.attainment.asked_outside()
        try:
            said, use = await clouds.ask(cloud, ask_of(job, cloud.model), job)
            if self._tasks.get(job) is asyncio.current_task():
                self._answered(job, said, use)
        except ResplitError as error:
            self._lost(job, error)
        except Exception:  # a defect of ours must end this request and no other
            log.exception("a cloud could not be asked")
            self._lost(job, ResplitError(ErrorCode.INTERNAL, "the cloud could not be asked; the agent's log says why"))
        served.admit()

    def _answered(self, job: Job, said: Said, use: CloudUse) -> None:
        del self._tasks[job]
        served = self._served
        newest = served.runs.newest
        job.meter.epoch = job.meter.epoch or (1 if newest is None else newest.plan.epoch)
        job.meter.cloud = use
        served.attainment.answered_outside(use)
        match job:
            case Generation():
                served.answers.completed_outside(job, said)
            case TensorJob():
                served.answers.computed_outside(job, said)

    def _lost(self, job: Job, error: ResplitError) -> None:
        """Nothing came of it: it waits here again if it could have, else it ends."""
        if self._tasks.get(job) is not asyncio.current_task():
            return
        del self._tasks[job]
        if job in self._may_wait:
            self._failed.add(job)
            self._served.queue.add(job)
        else:
            self._served.end(job, error)

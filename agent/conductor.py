"""Conducts requests through pipelines: each service is asked as soon as all that it waits for is there.

What a service fails in that says nothing against the request is asked again; everything else ends the request. On the
event loop.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from agent.asking import Asker, Reply
from agent.pipelinejob import PipelineJob, Values, looked_up, tensor, text_of, texts, token_ids
from schemas.base import DeploymentName, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.pipeline import REQUEST, Step, service_deployment
from schemas.request import (
    CompletionReply,
    EmbeddingReply,
    EmbeddingRequest,
    OipTensor,
    Request,
    StepTiming,
    TensorReply,
    TensorRequest,
    TextRequest,
)

PASSING = frozenset(
    {
        ErrorCode.NODE_LOST,
        ErrorCode.STALE_EPOCH,
        ErrorCode.STEP_LOST,
        ErrorCode.UNKNOWN_DEPLOYMENT,
        ErrorCode.UNREACHABLE,
        ErrorCode.OVERLOADED,
    }
)
"""What says nothing against a request: a service that moves, a node that is gone, a queue that is full."""
AGAIN_S = 0.05
AGAIN_MAX_S = 1.0
"""Between two attempts, at first and at most."""
PATIENCE_S = 20.0
"""For so long a service is asked again: longer than a lost node takes to be replaced."""
FULL_PATIENCE_S = 1.0
"""And so long one whose queue is full, which is told to the client: more load helps nobody."""

Done = Callable[[Values | ResplitError], None]

log = logging.getLogger(__name__)


class Conductor:
    """Asks the services of pipelines for the requests that one ingress has accepted."""

    def __init__(self, asker: Asker, now: Callable[[], float]) -> None:
        self._asker = asker
        self._now = now
        self._tasks: dict[PipelineJob, asyncio.Task[None]] = {}

    def begin(self, job: PipelineJob, pipeline: DeploymentName, done: Done, *, sealed: bool) -> None:
        """Conduct a request; `done` is called once, with all values or what went wrong, unless it is stopped."""
        job.steps.clear()
        work = asyncio.create_task(self._conduct(job, pipeline, done, sealed))
        self._tasks[job] = work

    def stop(self, job: PipelineJob) -> None:
        """Conduct it no further: what its services are at is cancelled."""
        if (work := self._tasks.pop(job, None)) is not None:
            work.cancel()

    async def _conduct(self, job: PipelineJob, pipeline: DeploymentName, done: Done, sealed: bool) -> None:
        found: Values | ResplitError
        try:
            found = await self._all_steps(job, pipeline, sealed)
        except* ResplitError as group:
            found = _first(group)
        except* Exception as group:  # a defect of ours must end this request and no other
            log.exception("a request could not be conducted", exc_info=group)
            message = "the request could not be conducted; the agent's log has the cause"
            found = ResplitError(ErrorCode.INTERNAL, message)
        if self._tasks.get(job) is asyncio.current_task():  # else it was stopped, and may have been begun anew
            del self._tasks[job]
            done(found)

    async def _all_steps(self, job: PipelineJob, pipeline: DeploymentName, sealed: bool) -> Values:
        values: Values = {REQUEST: job.values[REQUEST]}
        ready = {name: asyncio.Event() for name in job.task.steps}

        async def one(name: str, step: Step) -> None:
            for before in step.after - {REQUEST}:
                await ready[before].wait()
            values[name] = await self._one_step(job, pipeline, name, step, values, sealed)
            ready[name].set()

        async with asyncio.TaskGroup() as group:
            for name, step in job.task.steps.items():
                group.create_task(one(name, step))
        return values

    async def _one_step(
        self,
        job: PipelineJob,
        pipeline: DeploymentName,
        name: str,
        step: Step,
        values: Values,
        sealed: bool,
    ) -> dict[str, OipTensor]:
        began, pause = self._now(), AGAIN_S
        while True:
            try:
                request = self._asked(job, step, values)
                at, trace = service_deployment(pipeline, name), job.meter.trace.header
                reply = await self._asker.ask(at, request, sealed=sealed, trace=trace)
            except ResplitError as error:
                patience_s = FULL_PATIENCE_S if error.code is ErrorCode.OVERLOADED else PATIENCE_S
                if error.code not in PASSING or self._now() - began > patience_s:
                    raise ResplitError(error.code, f"service {name}: {error.message}", error.field) from error
                await asyncio.sleep(pause)
                pause = min(2.0 * pause, AGAIN_MAX_S)
            else:
                job.steps.append(self._timing(job, name, began, reply))
                return _given(reply)

    def _asked(self, job: PipelineJob, step: Step, values: Mapping[str, Mapping[str, OipTensor]]) -> Request:
        try:
            return self._request(job, step, values)
        except ValidationError as error:
            # Of what was given nothing is told: it is said in the audit trail too.
            first = error.errors(include_url=False, include_input=False)[0]
            message = f"what it is given makes no request ({'.'.join(map(str, first['loc']))}: {first['type']})"
            raise ResplitError(ErrorCode.STAGE_FAILED, message) from None

    def _request(self, job: PipelineJob, step: Step, values: Mapping[str, Mapping[str, OipTensor]]) -> Request:
        left_ms = None if job.deadline is None else int(1e3 * (job.deadline - self._now()))
        if left_ms is not None and left_ms <= 0:
            raise ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed before it was asked", "deadline_ms")
        common = {
            "request_id": RequestId(secrets.token_hex(8)),
            "deadline_ms": left_ms,
            "priority": job.slo.priority,
            "acknowledge": True,
        }
        if step.inputs is not None:
            inputs = tuple(
                looked_up(values, reference).model_copy(update={"name": name})
                for name, reference in step.inputs.items()
            )
            return TensorRequest(**common, inputs=inputs)
        if step.text is not None:
            return EmbeddingRequest(**common, input=text_of(looked_up(values, step.text)))
        if step.prompt is not None:
            return TextRequest(**common, prompt=text_of(looked_up(values, step.prompt)), max_tokens=step.max_tokens)
        ids = token_ids([looked_up(values, reference) for reference in step.token_ids or ()])
        return TextRequest(**common, token_ids=ids, max_tokens=step.max_tokens)

    def _timing(self, job: PipelineJob, name: str, began: float, reply: Reply) -> StepTiming:
        stages = reply.usage.stages
        return StepTiming(
            service=name,
            nodes=tuple(dict.fromkeys(stage.node for stage in stages)),
            waited_ms=round(1e3 * (began - job.meter.arrived), 3),
            total_ms=round(1e3 * (self._now() - began), 3),
            compute_ms=round(sum(stage.compute_ms for stage in stages), 3),
        )


def _given(reply: Reply) -> dict[str, OipTensor]:
    """What a service gave, by name."""
    match reply:
        case TensorReply():
            return {one.name: one for one in reply.outputs}
        case EmbeddingReply():
            return {"embedding": tensor(reply.data[0].embedding, "FP32")}
        case CompletionReply():
            return {"text": texts((reply.text,)), "token_ids": tensor(reply.token_ids, "INT64")}


def _first(group: BaseExceptionGroup[ResplitError]) -> ResplitError:
    """One of the errors in a group: where one step fails the others are cancelled, so as a rule there is one."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, ResplitError)
    return found

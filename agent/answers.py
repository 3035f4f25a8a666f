"""What the answers of a route mean to the clients: kept in the journal first, then said, each request's end once.

On the event loop, for one deployment at one ingress.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel

from agent.cloudwire import Said, nonsense
from agent.driver import Answered
from agent.generation import FinishReason, Generation
from agent.intake import Job
from agent.pipelinejob import PipelineJob, Values
from agent.run import RouteRun
from agent.tensorjob import TensorJob
from schemas.audit import AuditKind
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Result, SequenceId, Token
from schemas.journal import Run
from schemas.request import ErrorReply, TokenReply, Usage

if TYPE_CHECKING:
    from agent.served import Served

TELL_AFTER_S = 0.001

log = logging.getLogger(__name__)


class Answers:
    """Says what comes out of a deployment's requests."""

    def __init__(self, served: "Served") -> None:
        self._served = served
        self._untold: set[Callable[[], None]] = set()
        """Ends that the trail does not have yet, to be put into the journal."""

    def take(self, run: RouteRun, result: Result) -> None:
        """What came back over a route: the next steps leave at once, what it means is said after."""
        now = self._served.desk.now()
        fresh: list[tuple[Answered, Job, FinishReason | None]] = []
        decoding = run.driver.decoding
        for step in run.take(result, now):
            job, _ = self._served.jobs[step.sequence]
            job.meter.add(run.route, result.times, step.elapsed_s)
            if step.token is not None and step.token.index > 0:
                job.meter.beside(decoding)
            finish = None
            if step.token is not None and isinstance(job, Generation):
                finish = job.ends_with(step.token)
                if finish is None:
                    try:
                        run.go_on(step.sequence, step.token.token, job.allowed_after(step.token))
                    except ResplitError as error:
                        self._served.end(job, error)
                        continue
            fresh.append((step, job, finish))
        # The next step leaves first, and has a moment to get into ONNX Runtime, which lets the interpreter go: text
        # and replies are made while it computes. A stop string found then costs one step in vain.
        run.pump(now)
        self._served.desk.later(TELL_AFTER_S, lambda: self._store(result, fresh, now))

    def again(self, job: Generation, said: Sequence[Token]) -> bool:
        """Say what the other ingress may have said; True if that was all there is to say."""
        newest = self._served.runs.newest
        assert newest is not None, "requests are taken over where they can run"
        job.meter.runs_on(newest.plan.epoch, newest.route)
        # What the other ingress had to compute anew is not known here, and must not be called exact if it was not.
        job.meter.computed_anew(exactly=newest.replays_exactly)
        replies = job.resume(said, self._served.desk.now())
        final = replies.pop() if replies[-1].finish_reason is not None else None
        for reply in replies if job.request.stream else ():
            self._served.desk.say(job.reply, reply, job.request_id)
        if final is not None:
            self._finished(job, final)
        return final is not None

    def conducted(self, job: PipelineJob, sequence: SequenceId, found: Values | ResplitError) -> None:
        """What the services of a pipeline made of a request."""
        if sequence not in self._served.jobs:
            return
        try:
            self._conducted(job, sequence, found)
        except Exception as error:  # what one answer breaks must not keep the others waiting
            self.broke(job, error)
        self._served.admit()

    def _conducted(self, job: PipelineJob, sequence: SequenceId, found: Values | ResplitError) -> None:
        try:
            if isinstance(found, ResplitError):
                raise found
            answer = job.answer(found, self._served.desk.now())
        except ResplitError as error:
            self._served.end(job, error)
            return
        _, run = self._served.jobs.pop(sequence)
        run.end([sequence])
        self._served.attainment.took(answer.usage)
        confirmed = partial(self._ended_in_output, job, answer, answer.usage, total_ms=answer.usage.total_ms)
        self._served.journal.confirm(confirmed)

    def completed_outside(self, job: Generation, said: Said) -> None:
        """A cloud completed a text, which is kept and said in the tokens of the model here."""
        assert said.text is not None
        served = self._served
        ids = job.text.encode_output(said.text)[: job.max_tokens]
        if said.finish_reason == "stop" and len(ids) < job.max_tokens:
            ids += sorted(job.eos)[:1]  # so that whoever takes the request over sees that it has ended
        if not ids:
            served.end(job, nonsense("it is empty"))
            return
        assert job.handle is not None, "what leaves the cluster was accepted"
        tokens = [Token(0, 0, index, token) for index, token in enumerate(ids)]
        job.owed += tokens
        try:
            kept = Run(job.handle, 0, tuple(ids))
            served.journal.tokens([kept], lambda: self._tell_outside(job, tokens, said.finish_reason))
        except ResplitError as error:
            served.end(job, error)

    def _tell_outside(self, job: Generation, tokens: Sequence[Token], finish: FinishReason) -> None:
        now = self._served.desk.now()
        for token in tokens:
            if not self._served.desk.holds(job):
                return
            found = job.ends_with(token) or (finish if token is tokens[-1] else None)
            reply = job.take(token, found, now)
            if reply.finish_reason is not None:
                self._finished(job, reply)
                return
            if job.request.stream:
                self._served.desk.say(job.reply, reply, job.request_id)

    def computed_outside(self, job: TensorJob, said: Said) -> None:
        """A cloud computed vectors or tensors."""
        reply = job.answered_outside(said.vectors, said.tensors, self._served.desk.now())
        usage = reply.usage
        self._served.journal.confirm(lambda: self._ended_in_output(job, reply, usage, total_ms=usage.total_ms))

    def error(self, job: Job, error: ResplitError) -> None:
        """Say the one final error of a request that has ended."""
        self._served.desk.say(job.reply, ErrorReply(request_id=job.request_id, error=error.body), None)
        self._served.desk.audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in an error",
            deployment=self._served.name,
            request=job.request_id,
            then=self._owed_until_told(job, error.code.value),
            code=error.code.value,
            error=error.message,
            trace=job.meter.trace.id,
        )
        job.meter.trace.ended(error.code.value)

    def let_go(self) -> None:
        """This node leaves: whatever ended is owed no more, though the trail may not have it yet."""
        untold, self._untold = self._untold, set()
        for end in untold:
            end()

    def _owed_until_told(self, job: Job, how: str) -> Callable[[], None] | None:
        """To be called once the trail has it how a request ended. Till then the journal owes it: were this process
        killed in between, nobody else could say what became of it."""
        if job.handle is None:
            return None
        end = partial(self._served.journal.end, (job.handle,), how)
        self._untold.add(end)

        def told() -> None:
            if end in self._untold:
                self._untold.remove(end)
                end()

        return told

    def broke(self, job: Job, error: Exception) -> None:
        """A defect of ours: it ends this request and no other."""
        log.error("an answer could not be taken: %s", self._served.name, exc_info=error)
        self._served.end(job, ResplitError(ErrorCode.INTERNAL, f"the ingress failed: {type(error).__name__}"))

    def _store(self, result: Result, fresh: list[tuple[Answered, Job, FinishReason | None]], now: float) -> None:
        """Have the journal keep what a result holds; then say it."""
        kept: list[tuple[Answered, Job, FinishReason | None]] = []
        round_: list[Run] = []
        for step, job, finish in fresh:
            if step.sequence not in self._served.jobs:
                continue  # it ended in the meantime, or is computed anew and will come to this token again
            kept.append((step, job, finish))
            if step.token is not None and isinstance(job, Generation) and job.handle is not None:
                job.owed.append(step.token)
                likely = ((step.token.logprob, step.token.top),) if job.request.logprobs else ()
                round_.append(Run(job.handle, step.token.index, (step.token.token,), likely))
        if not round_:
            self._tell(result, kept, now)
            return
        try:
            self._served.journal.tokens(round_, lambda: self._tell(result, kept, now))
        except ResplitError as error:
            for _, job, _ in kept:
                self._served.end(job, error)
        except Exception as error:  # what the journal did not take would never be said, and nobody would know
            for _, job, _ in kept:
                self.broke(job, error)

    def _tell(self, result: Result, kept: list[tuple[Answered, Job, FinishReason | None]], now: float) -> None:
        """Say what a result means to the clients that still want to know."""
        for step, job, finish in kept:
            if not self._served.desk.holds(job):
                continue  # it ended in the meantime
            try:
                self._tell_step(result, step, job, finish, now)
            except Exception as error:  # what one answer breaks must not keep the others waiting
                self.broke(job, error)
        self._served.admit()

    def _tell_step(self, result: Result, step: Answered, job: Job, finish: FinishReason | None, now: float) -> None:
        match job:
            case Generation() if step.token is not None:
                reply = job.take(step.token, finish, now)
                if reply.finish_reason is not None:
                    self._finished(job, reply)
                elif job.request.stream:
                    self._served.desk.say(job.reply, reply, job.request_id)
            case TensorJob():
                self._take_tensors(step.sequence, job, result)
            case Generation():
                pass  # a prefill chunk before the last

    def _finished(self, job: Generation, last: TokenReply) -> None:
        assert last.usage is not None
        desk = self._served.desk
        desk.finished.add(self._served.name, job.meter, len(job.prompt), len(job.tokens), desk.now())
        self._ended_in_output(
            job,
            last if job.request.stream else job.whole(last),
            last.usage,
            finish_reason=last.finish_reason,
            prompt_tokens=len(job.prompt),
            completion_tokens=len(job.tokens),
            total_ms=last.usage.total_ms,
        )

    def _take_tensors(self, sequence: SequenceId, job: TensorJob, result: Result) -> None:
        answer = job.take(sequence, dict(result.tensors), self._served.desk.now())
        _, run = self._served.jobs.pop(sequence)
        run.end([sequence])
        if answer is not None:
            usage = answer.usage
            self._served.journal.confirm(lambda: self._ended_in_output(job, answer, usage, total_ms=usage.total_ms))

    def _ended_in_output(self, job: Job, reply: BaseModel, usage: Usage, **fields: str | int | float | None) -> None:
        if not self._served.desk.holds(job):
            return  # it ended in an error while the journal took its time
        self._served.desk.say(job.reply, reply, None)
        self._served.attainment.ended(self._served.promised_to(job.request), job, usage)
        for sequence in [
            s for s, (held, _) in self._served.jobs.items() if held is job and s not in self._served.crossings
        ]:
            _, run = self._served.jobs.pop(sequence)
            self._served.crossings.forget(sequence)
            run.finish(sequence, self._served.desk.now())
        self._served.forget(job)
        self._served.desk.audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in output",
            deployment=self._served.name,
            epoch=job.meter.epoch,
            request=job.request_id,
            then=self._owed_until_told(job, "output"),
            cloud=None if job.meter.cloud is None else job.meter.cloud.name,
            cost=None if job.meter.cloud is None else job.meter.cloud.cost,
            trace=job.meter.trace.id,
            **fields,
        )
        tokens = {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
        }
        job.meter.trace.ended(None, **tokens, **{"resplit.epoch": usage.epoch, "resplit.route": usage.route})

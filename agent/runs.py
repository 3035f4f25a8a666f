"""The routes that requests of one deployment may run over, as one ingress sees them, and which of them is best."""

from collections.abc import Iterable, Sequence

from agent.forecast import Forecast, Line, Work, forecast, forecast_calls
from agent.generation import Generation
from agent.intake import Job
from agent.pace import Likened, Pace
from agent.pipelinejob import PipelineJob
from agent.run import RouteRun
from agent.speeds import Speeds
from agent.tensorjob import TensorJob
from schemas.frame import SequenceId
from schemas.plan import Plan

Running = tuple[Job, RouteRun, SequenceId]

LATELY_S = 5.0
"""What was measured on a route before that counts for less than what its nodes say, held against a route in use."""


class Runs(dict[tuple[int, int], RouteRun]):
    """By (epoch, route). A route need not begin at this node: any ingress may drive any route of a plan."""

    def __init__(self, speeds: Speeds) -> None:
        super().__init__()
        self._speeds = speeds

    @property
    def current(self) -> list[RouteRun]:
        """Routes that new requests enter by: of plans in force, else of one that drains but has no successor here."""
        entering = [run for run in self.values() if run.is_own and not run.draining]
        return [run for run in entering if not run.leaving] or entering

    @property
    def newest(self) -> RouteRun | None:
        """A route of the newest plan here, wherever it begins."""
        return self[max(self)] if self else None

    @property
    def cold(self) -> Plan | None:
        """The plan in force, if it has nothing loaded: requests wait, and none begins on what drains before it."""
        return next((run.plan for run in self.values() if run.plan.cold and not run.leaving), None)

    @property
    def open(self) -> list[RouteRun]:
        """Where something may start: on plans in force, else on those that drain."""
        found = [run for run in self.values() if run.is_open]
        return [run for run in found if not run.leaving] or found

    def able(self, job: Job) -> list[RouteRun]:
        """Routes that could run a request, once they have a slot."""
        if self.cold is not None:
            return []
        could = [
            run
            for run in self.values()
            if run.is_open
            and run.plan.model == job.model
            and (run.holds(job.slots_needed) if isinstance(job, Generation) else _may_conduct(run, job))
        ]
        return [run for run in could if not run.leaving] or could

    def ranked(self, job: Job, running: Iterable[Running], now: float) -> list[RouteRun]:
        """Those that may have a slot now, in order."""
        tokens_max = job.slots_needed if isinstance(job, Generation) else None
        return self.in_order([run for run in self.able(job) if run.may_start(tokens_max, now)], job, running, now)

    def in_order(self, could: list[RouteRun], job: Job, running: Iterable[Running], now: float) -> list[RouteRun]:
        """These, the one first on which the request is predicted to end first.

        A route on which a step is overdue comes last, however fast it was. Of equals, the one that has most of the
        prompt in its caches, then the idlest, then one that begins here.
        """
        if len(could) < 2:
            return could
        held, prompt = tuple(running), job.prompt if isinstance(job, Generation) else ()
        keys = {}
        for run in could:
            seen = self.predicted(run, job, held, (), now, could)
            ends_ms = 0.0 if seen is None else seen.e2e_ms
            keys[run] = (run.driver.stalled, ends_ms, -run.cached(prompt, now), run.active, not run.is_own)
        return sorted(could, key=keys.__getitem__)

    def forecast(self, job: Job, running: Iterable[Running], ahead: Sequence[Job], now: float) -> Forecast | None:
        """How long a request would take that came now, behind `ahead`, on the route where it would end first; None
        while too little was measured to say."""
        held, could = tuple(running), self.able(job)
        # What waits goes to whichever route is free: each of them takes its share.
        shares = [ahead[i :: len(could)] for i in range(len(could))]
        seen = [self.predicted(run, job, held, share, now) for run, share in zip(could, shares, strict=True)]
        return min((one for one in seen if one is not None), key=lambda one: one.e2e_ms, default=None)

    def predicted(
        self,
        run: RouteRun,
        job: Job,
        running: Iterable[Running],
        ahead: Sequence[Job],
        now: float,
        others: Sequence[RouteRun] = (),
    ) -> Forecast | None:
        """How long the request would take on one route, if it is known how fast that is."""
        if isinstance(job, PipelineJob):
            return None  # what its services take, they say themselves
        if isinstance(job, TensorJob):
            called = run.driver.pace
            if not called.call.is_known(now):
                # It is thought as fast as the fastest of the others, so that it is tried.
                known = [other.driver.pace for other in others if other.driver.pace.call.is_known(now)]
                called = min(known, key=lambda one: one.call.seconds(1), default=called)
            calls = sum(len(other.waiting) for other in ahead if isinstance(other, TensorJob))
            return forecast_calls(called, run.route.max_sequences, calls + run.active, len(job.waiting), now)
        pace = self.pace(run, others, now)
        if pace is None:
            return None
        need, settings = job.slots_needed, run.plan.settings
        line = Line(
            run.rows_for(need),
            run.route.max_sequences,
            settings.chunk_tokens,
            settings.pipeline_depth,
            [
                Work(
                    # The most urgent prompt goes first.
                    run.driver.unfilled(sequence) if other.urgency.due <= job.urgency.due else 0,
                    other.tokens_left,
                    run.driver.prompt(sequence).capacity >= need,
                )
                for other, over, sequence in running
                if over is run and isinstance(other, Generation)
            ],
            [
                Work(len(other.prompt), other.tokens_left, run.contends(other.slots_needed, need))
                for other in ahead
                if isinstance(other, Generation)
            ],
            run.driver.chunks_in_flight,
        )
        return forecast(pace, line, Work(len(job.prompt) - run.cached(job.prompt, now), job.tokens_left))

    def pace(self, run: RouteRun, others: Sequence[RouteRun], now: float) -> Pace | Likened | None:
        """How fast a route is. One that was not used lately is held against the one that was used last, by what the
        nodes of both say; where they do not say, it is thought as fast, so that it is tried."""
        own = run.driver.pace
        if own.generates(now, LATELY_S):
            return own
        known = [other for other in others if other is not run and other.driver.pace.generates(now)]
        if not known:
            return own if own.generates(now) else None
        other = max(known, key=lambda one: one.driver.pace.last)
        if own.generates(now) and own.last >= other.driver.pace.last:
            return own
        mine = self._speeds.of(run.plan.model, run.route)
        theirs = self._speeds.of(other.plan.model, other.route)
        if mine is None or theirs is None:
            return own if own.generates(now) else other.driver.pace
        return Likened(
            other.driver.pace,
            mine.step_s - theirs.step_s,
            mine.token_s - theirs.token_s,
            mine.busiest_token_s - theirs.busiest_token_s,
        )


def _may_conduct(run: RouteRun, job: Job) -> bool:
    """A pipeline is conducted where its requests come in: at another ingress there is nothing that would take them."""
    return run.is_own or not isinstance(job, PipelineJob)


def succeeds(run: RouteRun, old: RouteRun) -> bool:
    """Whether sequences of `old` can go on over `run` with their caches."""
    return run.plan.family == old.plan.family and run.plan.epoch > old.plan.epoch and not run.leaving

"""The routes that requests of one deployment may run over, as one ingress sees them, and which of them is best."""

from collections.abc import Iterable, Sequence

from agent.forecast import Forecast, Line, Work, forecast, forecast_calls
from agent.generation import Generation
from agent.intake import Job
from agent.run import RouteRun
from agent.tensorjob import TensorJob


class Runs(dict[tuple[int, int], RouteRun]):
    """By (epoch, route). A route need not begin at this node: any ingress may drive any route of a plan."""

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
    def open(self) -> list[RouteRun]:
        """Where something may start: on plans in force, else on those that drain."""
        found = [run for run in self.values() if run.is_open]
        return [run for run in found if not run.leaving] or found

    def able(self, job: Job) -> list[RouteRun]:
        """Routes that could run a request, once they have a slot."""
        could = [
            run
            for run in self.values()
            if run.is_open
            and run.plan.model == job.model
            and (isinstance(job, TensorJob) or run.holds(job.slots_needed))
        ]
        return [run for run in could if not run.leaving] or could

    def ranked(self, job: Job, running: Iterable[tuple[Job, RouteRun, int]], now: float) -> list[RouteRun]:
        """Those that have a slot now, the one first on which the request is predicted to end first.

        `running` is what runs, on which route, with how many tokens of its prompt left to send. Of equals, the one
        that has most of the prompt in its caches, then the idlest, then one that begins here.
        """
        could = [run for run in self.able(job) if run.slots_free and now >= run.closed_until]
        if len(could) < 2:
            return could
        prompt = job.prompt if isinstance(job, Generation) else ()
        loads = loads_of(could, running)
        keys = {}
        for run in could:
            seen = self.predicted(run, job, loads[run], (), now, could)
            keys[run] = (0.0 if seen is None else seen.e2e_ms, -run.cached(prompt, now), run.active, not run.is_own)
        return sorted(could, key=keys.__getitem__)

    def predicted(
        self,
        run: RouteRun,
        job: Job,
        load: Sequence[Work],
        ahead: Sequence[Work],
        now: float,
        others: Sequence[RouteRun] = (),
    ) -> Forecast | None:
        """How long the request would take on a route; one that was not measured is thought as fast as the fastest of
        `others`, so that it is tried."""
        pace = run.driver.pace
        if isinstance(job, TensorJob):
            calls = int(sum(work.tokens for work in ahead)) + run.active
            return forecast_calls(pace, run.route.max_sequences, calls, len(job.waiting), now)
        if not pace.generates(now):
            known = [other.driver.pace for other in others if other.driver.pace.generates(now)]
            pace = min(known, key=lambda one: one.step.seconds(1), default=pace)
        settings = run.plan.settings
        line = Line(run.route.max_sequences, settings.chunk_tokens, settings.pipeline_depth, load, ahead)
        own = Work(len(job.prompt) - run.cached(job.prompt, now), job.tokens_left)
        return forecast(pace, line, own, now)


def loads_of(runs: Iterable[RouteRun], running: Iterable[tuple[Job, RouteRun, int]]) -> dict[RouteRun, list[Work]]:
    """What is left of the sequences on each of these routes."""
    loads: dict[RouteRun, list[Work]] = {run: [] for run in runs}
    for job, run, unfilled in running:
        if run in loads and isinstance(job, Generation):
            loads[run].append(Work(unfilled, job.tokens_left))
    return loads


def succeeds(run: RouteRun, old: RouteRun) -> bool:
    """Whether sequences of `old` can go on over `run` with their caches."""
    return run.plan.family == old.plan.family and run.plan.epoch > old.plan.epoch and not run.leaving

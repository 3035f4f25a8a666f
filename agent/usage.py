"""What a request cost, gathered as its frames come back."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from agent.traces import Trace
from schemas.deployment import Stage
from schemas.frame import StageTime
from schemas.plan import Route
from schemas.request import CloudUse, StageTiming, Usage


@dataclass(slots=True)
class _Spent:
    compute_us: int = 0
    queue_us: int = 0
    calls: int = 0


@dataclass(slots=True)
class Meter:
    """Times of one request, in seconds of the ingress' monotonic clock."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    epoch: int = 0
    """The last one it ran on."""
    route: Route | None = None
    cached_tokens: int = 0
    """Of the prompt, when it last began."""
    recovered: Literal["identical", "equivalent"] | None = None
    """How it was computed anew, if it was."""
    ahead_tokens: int = 0
    """Of other prompts that were not computed yet when it began."""
    steady: bool = True
    """Whether it ran over one route of one plan, and was begun once."""
    late: bool = False
    """Whether it has missed a target of its class for good, and was counted so."""
    cloud: CloudUse | None = None
    """What answered it, if that was none of the nodes."""
    trace: Trace = field(default_factory=Trace)
    has_run: bool = False
    """Whether a frame of it came back."""
    _steps: int = 0
    _rows: int = 0
    _stages: dict[Stage, _Spent] = field(default_factory=dict)
    _away_us: int = 0

    def runs_on(self, epoch: int, route: Route) -> None:
        """From now on it runs over this route."""
        self.steady = self.steady and self.route is None
        self.epoch, self.route = epoch, route
        for stage in route.stages:
            self._stages.setdefault(stage, _Spent())

    def computed_anew(self, *, exactly: bool) -> None:
        """It was; what is not exact once makes all that follows only equivalent."""
        self.recovered = "identical" if exactly and self.recovered != "equivalent" else "equivalent"

    def bounced(self) -> None:
        """It found no slot after all: if nothing of it ran, it has not begun."""
        if not self.has_run:
            self.started = self.route = None
            self._stages.clear()

    def add(self, route: Route, times: Iterable[StageTime], elapsed_s: float) -> None:
        """Count one frame that came back over `route`, not always the last begun: its times at each stage it passed,
        and how long it was away in all."""
        self.has_run = True
        self._away_us += round(1e6 * elapsed_s)
        for time in times:
            spent = self._stages.setdefault(route.stages[time.stage], _Spent())
            spent.compute_us += time.compute_us
            spent.queue_us += time.queue_us
            spent.calls += 1

    @property
    def batch(self) -> float:
        """Sequences that ran beside each other in its steps, itself included, on average."""
        return max(1.0, self._rows / self._steps) if self._steps else 1.0

    def beside(self, sequences: int) -> None:
        """A step of it came back while so many sequences, itself included, were decoding."""
        self._steps += 1
        self._rows += sequences

    def token(self, now: float) -> None:
        """A token came out."""
        if self.first_token is None:
            self.trace.saw("first token")
        self.first_token = now if self.first_token is None else self.first_token
        self.last_token = now

    def usage(self, prompt_tokens: int, completion_tokens: int, now: float) -> Usage:
        """The bill, with every stage that it ever ran on."""
        assert self.route is not None or self.cloud is not None, "a request that was admitted has a route"
        started = now if self.started is None else self.started
        busy_us = sum(s.compute_us + s.queue_us for s in self._stages.values())
        tpot = None
        if completion_tokens > 1 and self.first_token is not None and self.last_token is not None:
            tpot = 1e3 * (self.last_token - self.first_token) / (completion_tokens - 1)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            cached_tokens=self.cached_tokens,
            recovered=self.recovered,
            queued_ms=_ms(started - self.arrived),
            ttft_ms=None if self.first_token is None else _ms(self.first_token - self.arrived),
            tpot_ms=None if tpot is None else round(tpot, 3),
            total_ms=_ms(now - self.arrived),
            network_ms=round(max(0, self._away_us - busy_us) / 1e3, 3),
            epoch=self.epoch,
            route=0 if self.route is None else self.route.index,
            stages=tuple(
                StageTiming(
                    node=stage.node,
                    first=stage.first,
                    last=stage.last,
                    compute_ms=spent.compute_us / 1e3,
                    queue_ms=spent.queue_us / 1e3,
                    calls=spent.calls,
                )
                for stage, spent in self._stages.items()
            ),
            cloud=self.cloud,
        )


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)

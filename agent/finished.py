"""What requests met that ended here, for the heartbeat: what was predicted for them is held against it."""

from collections import deque

from agent.usage import Meter
from schemas.base import DeploymentName
from schemas.capacity import FINISHED_MAX, FinishedRequest

TOLD_S = 5.0
"""For so long a request is told in every heartbeat, so that one of them may be lost."""


class Finished:
    """The latest requests that ended in output; numbered, so that each is counted once."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, FinishedRequest]] = deque(maxlen=FINISHED_MAX)
        self._count = 0

    def add(self, deployment: DeploymentName, meter: Meter, prompt_tokens: int, output_tokens: int, now: float) -> None:
        """A request ended. One that crossed from a plan to another, or was recomputed, met two: it is left out."""
        if not meter.steady or meter.route is None or meter.started is None or meter.first_token is None:
            return
        if meter.last_token is None or meter.first_token <= meter.started:
            return
        tpot_ms = None
        if output_tokens > 1 and meter.last_token > meter.first_token:
            tpot_ms = 1e3 * (meter.last_token - meter.first_token) / (output_tokens - 1)
        found = FinishedRequest(
            number=self._count,
            deployment=deployment,
            epoch=meter.epoch,
            route=meter.route.index,
            prompt_tokens=max(1, prompt_tokens - meter.cached_tokens),
            cached_tokens=meter.cached_tokens,
            output_tokens=output_tokens,
            ahead_tokens=meter.ahead_tokens,
            batch=meter.batch,
            started_ms=max(0.0, 1e3 * (now - meter.started)),
            ttft_ms=1e3 * (meter.first_token - meter.started),
            tpot_ms=tpot_ms,
        )
        self._count += 1
        self._latest.append((now, found))

    def recent(self, now: float) -> tuple[FinishedRequest, ...]:
        """Those of the last `TOLD_S`, the first one first."""
        return tuple(found for at, found in self._latest if now - at <= TOLD_S)

"""What becomes of the requests of one deployment, and how they fare against its class: counters, and what counts.

A request is held to the looser of its own class and the deployment's, and to no target that the deployment does not
declare: nobody burns the deployment's error budget by asking for the impossible.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from schemas.base import DeploymentName
from schemas.capacity import Service
from schemas.errors import ErrorCode
from schemas.request import Usage
from schemas.slo import Slo

TIMELY = frozenset({ErrorCode.DEADLINE_EXCEEDED, ErrorCode.DEADLINE_UNATTAINABLE})


@dataclass(slots=True)
class Attainment:
    """Since the process began."""

    answered: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    met: int = 0
    missed: int = 0

    def ended(self, promised: Slo | None, own: Slo, usage: Usage) -> None:
        """A request of class `own` ended in output."""
        if usage.completion_tokens:
            self.answered += 1
            self.prompt_tokens += usage.prompt_tokens - usage.cached_tokens
            self.output_tokens += usage.completion_tokens
        if promised is None or not promised.promises:
            return
        first_ms = usage.total_ms if usage.ttft_ms is None else usage.ttft_ms
        held_to = (
            (first_ms, promised.ttft_ms, own.ttft_ms),
            (usage.tpot_ms or 0.0, promised.tpot_ms, own.tpot_ms),
            (usage.total_ms, promised.deadline_ms, own.deadline_ms),
        )
        if any(target is not None and ms > max(target, asked or 0.0) for ms, target, asked in held_to):
            self.missed += 1
        else:
            self.met += 1

    def refused(self, promised: Slo | None, own: Slo, code: ErrorCode) -> None:
        """A request of class `own` was refused: it counts where there was no capacity for it."""
        if code in (ErrorCode.OVERLOADED, ErrorCode.DEADLINE_UNATTAINABLE):
            self.failed(promised, own, code)

    def failed(self, promised: Slo | None, own: Slo, code: ErrorCode) -> None:
        """A request of class `own` that was accepted ended in an error."""
        if promised is None or not promised.promises or code is ErrorCode.CANCELLED:
            return
        deadline_ms = promised.deadline_ms
        if code in TIMELY and (deadline_ms is None or (own.deadline_ms or 0.0) < deadline_ms):
            return  # the deadline was the client's
        self.missed += 1


def services(attainments: Mapping[DeploymentName, Attainment]) -> tuple[Service, ...]:
    """What a heartbeat says of every deployment of which any request was counted."""
    counted = {name: asdict(found) for name, found in sorted(attainments.items())}
    return tuple(Service(deployment=name, **found) for name, found in counted.items() if any(found.values()))

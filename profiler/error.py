"""PURE: how far predictions were from what then happened, so that the planner's figures come with their error."""

from dataclasses import dataclass
from statistics import median

REQUESTS = 256
"""The error is over as many finished requests, the latest ones."""


@dataclass(frozen=True)
class Outcome:
    """One figure of one request, in milliseconds."""

    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured: above 0, it was faster than predicted."""
        return (self.predicted_ms - self.measured_ms) / self.measured_ms


@dataclass(frozen=True)
class PredictionError:
    """What was predicted for the latest requests and what they met, oldest first."""

    ttft: tuple[Outcome, ...] = ()
    tpot: tuple[Outcome, ...] = ()
    requests: int = 0
    """All that were ever held against their prediction."""

    def finished(
        self,
        *,
        predicted_ttft_ms: float,
        predicted_tpot_ms: float,
        ttft_ms: float | None,
        tpot_ms: float | None,
    ) -> "PredictionError":
        """A request ended; None where it had no first or no second token."""
        return PredictionError(
            _with(self.ttft, predicted_ttft_ms, ttft_ms),
            _with(self.tpot, predicted_tpot_ms, tpot_ms),
            self.requests + 1,
        )

    @property
    def terms(self) -> dict[str, float]:
        """Median of the size of the error, and of the error itself (its bias), for each figure that has one."""
        found = {}
        for name, outcomes in (("ttft", self.ttft), ("tpot", self.tpot)):
            if outcomes:
                found[f"{name}_error"] = round(median(abs(one.error) for one in outcomes), 4)
                found[f"{name}_bias"] = round(median(one.error for one in outcomes), 4)
        return found

    @property
    def sentence(self) -> str | None:
        """The errors as a person would put them; None before there is one."""
        said = []
        for name, outcomes in (("a token", self.tpot), ("to the first token", self.ttft)):
            if outcomes:
                predicted, measured = (
                    median(values)
                    for values in ([one.predicted_ms for one in outcomes], [one.measured_ms for one in outcomes])
                )
                error = median(abs(one.error) for one in outcomes)
                said.append(f"{predicted:.1f} ms {name} predicted, {measured:.1f} measured, {error:.0%} off")
        if not said:
            return None
        count = max(len(self.ttft), len(self.tpot))
        return f"{'; '.join(said)} (medians of the latest {count} request{'s' if count > 1 else ''})"


def _with(outcomes: tuple[Outcome, ...], predicted_ms: float, measured_ms: float | None) -> tuple[Outcome, ...]:
    if measured_ms is None or measured_ms <= 0:
        return outcomes
    return (*outcomes, Outcome(predicted_ms, measured_ms))[-REQUESTS:]

"""PURE: how far predictions were from what then happened, so that the planner's figures come with their error."""

from dataclasses import dataclass, replace
from statistics import median

REQUESTS = 256
"""The error is over as many finished requests, the latest ones."""


@dataclass(frozen=True)
class PredictionError:
    """(predicted - measured) / measured of each request, oldest first: above 0, it was faster than predicted."""

    ttft: tuple[float, ...] = ()
    tpot: tuple[float, ...] = ()

    def finished(
        self,
        *,
        predicted_ttft_ms: float,
        predicted_tpot_ms: float,
        ttft_ms: float | None,
        tpot_ms: float | None,
    ) -> "PredictionError":
        """A request ended; None where it had no first or no second token."""
        return replace(
            self,
            ttft=_with(self.ttft, predicted_ttft_ms, ttft_ms),
            tpot=_with(self.tpot, predicted_tpot_ms, tpot_ms),
        )

    @property
    def terms(self) -> dict[str, float]:
        """Median of the size of the error, and of the error itself (its bias), for each figure that has one."""
        found = {}
        for name, errors in (("ttft", self.ttft), ("tpot", self.tpot)):
            if errors:
                found[f"{name}_error"] = round(median(abs(error) for error in errors), 4)
                found[f"{name}_bias"] = round(median(errors), 4)
        return found


def _with(errors: tuple[float, ...], predicted_ms: float, measured_ms: float | None) -> tuple[float, ...]:
    if measured_ms is None or measured_ms <= 0:
        return errors
    return (*errors, (predicted_ms - measured_ms) / measured_ms)[-REQUESTS:]

"""PURE: who goes first, from a request's class: one number for its first token, one for those after.

Both are static, so that waiting requests stay sorted, and both are finite, so that nobody waits for ever: whoever
comes later is due later, and a higher priority is a head start of `PRIORITY_S` a level, no more.
"""

from dataclasses import dataclass

from schemas.slo import Slo

PATIENCE_S = 30.0
"""Without a target, a request counts as due so long after its arrival: among such, first come, first served."""
PRIORITY_S = 30.0
"""What a level of priority is worth. It is as long as the patience: of two requests that come together the one of
higher priority goes first, whatever their targets, and one that has waited this long overtakes new ones of the next
level."""
PACE_S = 1.0
"""Without a target, a token counts as due so long after the last one."""


@dataclass(frozen=True, slots=True)
class Urgency:
    """Smaller is more urgent, in seconds of the ingress' monotonic clock."""

    due: float = 0.0
    """When the first token is due (of a model that yields none: the answer), less the head start."""
    pace_s: float = PACE_S
    """How long after a token the next one is due."""


UNHURRIED = Urgency()
"""Of who came first, first."""


def urgency(slo: Slo, arrived: float, tokens: int = 1, rest_s: float = 0.0) -> Urgency:
    """The urgency of a request for `tokens` tokens that arrived at `arrived`.

    `rest_s` is what the tokens after the first are predicted to take: with a deadline for the last one, the first is
    due so much earlier (the least slack goes first).
    """
    due_s, pace_s = PATIENCE_S, PACE_S
    if slo.ttft_ms is not None:
        due_s = min(due_s, slo.ttft_ms / 1e3)
    if slo.deadline_ms is not None:
        due_s = min(due_s, max(0.0, slo.deadline_ms / 1e3 - rest_s))
        pace_s = min(pace_s, slo.deadline_ms / 1e3 / tokens)
    if slo.tpot_ms is not None:
        pace_s = min(pace_s, slo.tpot_ms / 1e3)
    return Urgency(arrived + due_s - PRIORITY_S * slo.priority, pace_s)

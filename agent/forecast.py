"""PURE: how long a request will take on a route, from what its ingress measured there.

    TTFT = max(wait for a slot, the prefill before it) + its own;  E2E = TTFT + (tokens - 1) * TPOT

(mathematics.md A1, with what was measured in place of the model.) Before anything was measured there is no forecast,
and what was measured long ago says nothing: so nothing is refused on a guess, and after a pause one request finds out,
unless another route was in use meanwhile (`agent.runs`).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from agent.pace import Likened, Pace

PRUDENCE = 1.25
"""A deadline is given up only where the forecast exceeds it by a quarter: it is an estimate, and a request that
might have made it is worth more than the steps that it takes."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of one sequence: prompt tokens to prefill, then tokens to generate."""

    prefill: int
    tokens: int
    contends: bool = True
    """Whether it has, or will take, a slot that the request could have: others hold shorter ones."""


@dataclass(frozen=True, slots=True)
class Line:
    """One route: what runs there, and who stands before the request, in the order in which they will start."""

    slots: int
    """That could hold the request, free or taken."""
    sequences_max: int
    chunk_tokens: int
    depth: int
    running: Sequence[Work] = ()
    ahead: Sequence[Work] = ()
    chunks_in_flight: int = 0
    """Of prompts that run."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one request, in milliseconds from now."""

    wait_ms: float
    """Until it has a slot."""
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float

    def attains(self, deadline_ms: float) -> bool:
        """Whether a deadline so far from now may be met."""
        return self.e2e_ms <= PRUDENCE * deadline_ms


def forecast(pace: Pace | Likened, line: Line, work: Work) -> Forecast:
    """When `work` would be done if it came last.

    Slots free in the order in which what holds them ends; prompts are prefilled one after the other; everybody
    decodes at the pace of a full route, if it will be full.
    """
    sequences = max(len(line.running), min(line.sequences_max, len(line.running) + len(line.ahead) + 1))
    step_s = pace.step_s(ceil(sequences / line.depth))
    prefilled_s = line.chunks_in_flight * pace.gap_s(line.chunk_tokens)
    free_s = [0.0] * (line.slots - sum(other.contends for other in line.running))
    for other in line.running:
        prefilled_s += _gaps_s(pace, line, other.prefill)
        if other.contends:
            free_s.append((prefilled_s if other.prefill else 0.0) + other.tokens * step_s)
    heapq.heapify(free_s)
    for other in line.ahead:
        begins_s = free_s[0] if other.contends else 0.0
        prefilled_s = max(prefilled_s, begins_s) + _gaps_s(pace, line, other.prefill)
        if other.contends:
            heapq.heapreplace(free_s, prefilled_s + other.tokens * step_s)
    wait_s = free_s[0]
    ttft_s = max(prefilled_s, wait_s) + _prefill_s(pace, line, work.prefill)
    e2e_s = ttft_s + max(0.0, work.tokens - 1) * step_s
    return Forecast(1e3 * wait_s, 1e3 * ttft_s, 1e3 * step_s, 1e3 * e2e_s)


def forecast_calls(pace: Pace, slots: int, ahead: int, calls: int, now: float) -> Forecast | None:
    """The same for `calls` calls of a model without caches behind `ahead` others that are not answered yet."""
    if not pace.call.is_known(now):
        return None
    each_s = pace.call.seconds(1)
    e2e_s = each_s * ceil((ahead + calls) / slots)
    return Forecast(1e3 * each_s * (ahead // slots), 1e3 * e2e_s, 0.0, 1e3 * e2e_s)


def _prefill_s(pace: Pace | Likened, line: Line, tokens: int) -> float:
    """Chunks that follow each other, the last one to its end."""
    if not tokens:
        return 0.0
    whole = (tokens - 1) // line.chunk_tokens
    return whole * pace.gap_s(line.chunk_tokens) + pace.chunk_s(tokens - whole * line.chunk_tokens)


def _gaps_s(pace: Pace | Likened, line: Line, tokens: int) -> float:
    """How much later what comes behind so many tokens is through."""
    whole, rest = divmod(tokens, line.chunk_tokens)
    return whole * pace.gap_s(line.chunk_tokens) + (pace.gap_s(rest) if rest else 0.0)

"""PURE: what the requests of a deployment lately were, from the counters in its ingresses' heartbeats."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp

from profiler.cost import PROMPT_TOKENS
from profiler.objective import Demand
from schemas.base import DeploymentName
from schemas.capacity import Capacity, Service

REQUESTS = 32
"""The habit is that of so many requests, the latest ones."""
TOKENS_MAX = 1 << 20
"""Of a prompt or an answer: more than any model reads. A node that counts wrongly must not become the habit."""


@dataclass(frozen=True)
class Habit:
    """A request on average. Before any ended it is the one that figures are quoted for."""

    prompt_tokens: float = PROMPT_TOKENS
    """To compute: those whose caches are kept of an earlier turn are not counted."""
    output_tokens: float = Demand.output_tokens


def learned(
    habits: Mapping[DeploymentName, Habit], before: Capacity | None, capacity: Capacity
) -> Mapping[DeploymentName, Habit]:
    """The habits after a heartbeat that followed `before`; a process that is new counts from 0."""
    known = {one.deployment: one for one in before.service} if before and before.boot == capacity.boot else {}
    found = dict(habits)
    for one in capacity.service:
        last = known.get(one.deployment, Service(deployment=one.deployment))
        count = one.answered - last.answered
        if count > 0:
            mean = Habit(
                _mean(one.prompt_tokens - last.prompt_tokens, count),
                _mean(one.output_tokens - last.output_tokens, count),
            )
            old = found.get(one.deployment, mean)
            weight = 1 - exp(-count / REQUESTS)
            found[one.deployment] = Habit(
                old.prompt_tokens + weight * (mean.prompt_tokens - old.prompt_tokens),
                old.output_tokens + weight * (mean.output_tokens - old.output_tokens),
            )
    return found


def _mean(tokens: int, count: int) -> float:
    return min(max(1.0, tokens / count), TOKENS_MAX)

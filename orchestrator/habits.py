"""PURE: what the requests of a deployment lately were, from the counters in its ingresses' heartbeats."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """A request on average. Before any came it is the one that figures are quoted for.

    What requests ask for is known of all that come, what they take only of those that end; and of an overload those
    end that take little. So it is what all ask for, and how much of theirs the others took.
    """

    asked_prompt: float = PROMPT_TOKENS
    """Tokens of a prompt."""
    asked_output: float = Demand.output_tokens
    """Tokens that it may say."""
    computed: float = 1.0
    """Of the prompt, what is computed: not what is kept of an earlier turn."""
    said: float | None = None
    """Of what it may say, what it says; None before any ended."""

    @property
    def prompt_tokens(self) -> float:
        """To compute."""
        return max(1.0, self.computed * self.asked_prompt)

    @property
    def output_tokens(self) -> float:
        """To come out."""
        if self.said is None:
            return min(self.asked_output, Demand.output_tokens)
        return max(1.0, self.said * self.asked_output)


def learned(
    habits: Mapping[DeploymentName, Habit], before: Capacity | None, capacity: Capacity
) -> Mapping[DeploymentName, Habit]:
    """The habits after a heartbeat that followed `before`; a process that is new counts from 0."""
    known = {one.deployment: one for one in before.service} if before and before.boot == capacity.boot else {}
    found = dict(habits)
    for one in capacity.service:
        last = known.get(one.deployment, Service(deployment=one.deployment))
        habit = _asked(found.get(one.deployment), last, one)
        if habit is not None:
            found[one.deployment] = _took(habit, last, one)
    return found


def _asked(habit: Habit | None, last: Service, one: Service) -> Habit | None:
    count = one.sized - last.sized
    if count <= 0:
        return habit
    prompt = _mean(one.sized_prompt_tokens - last.sized_prompt_tokens, count)
    output = _mean(one.sized_max_tokens - last.sized_max_tokens, count)
    if habit is None:
        return Habit(prompt, output)
    return replace(
        habit,
        asked_prompt=_closer(habit.asked_prompt, prompt, count),
        asked_output=_closer(habit.asked_output, output, count),
    )


def _took(habit: Habit, last: Service, one: Service) -> Habit:
    count = one.answered - last.answered
    if count <= 0:
        return habit
    computed = _share(one.prompt_tokens - last.prompt_tokens, one.answered_prompt_tokens - last.answered_prompt_tokens)
    said = _share(one.output_tokens - last.output_tokens, one.answered_max_tokens - last.answered_max_tokens)
    if habit.said is None:
        return replace(habit, computed=computed, said=said)
    return replace(habit, computed=_closer(habit.computed, computed, count), said=_closer(habit.said, said, count))


def _closer(old: float, new: float, count: int) -> float:
    return old + (1 - exp(-count / REQUESTS)) * (new - old)


def _mean(tokens: int, count: int) -> float:
    return min(max(1.0, tokens / count), TOKENS_MAX)


def _share(part: int, whole: int) -> float:
    return min(max(0.0, part / whole), 1.0) if whole > 0 else 1.0

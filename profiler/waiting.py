"""PURE: how sequences that run at once hold each other up. Times in milliseconds.

A route has decode steps and prefill chunks in flight, `depth` of each at once, and a stage runs them in turn
(`agent.batching`). What shares processors shares time: stages on nodes of one machine whose cores overlap are one
resource here, and what two stages on two machines do at once costs nobody anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from profiler.objective import RHO_COUNTED_MAX, queue_wait_ms
from schemas.capacity import Capacity


@dataclass(frozen=True)
class StageWork:
    """What one stage has to do for a sequence."""

    resource: int
    """Stages of one number share processors."""
    step_ms: float
    """One decode step of one group."""
    chunk_ms: float
    """One prefill chunk, on average."""
    beside_ms: float
    """One decode step of the sequences beside one that is prefilled; 0 if there are none."""


@dataclass(frozen=True)
class Waits:
    """What is added to the undisturbed times of a sequence."""

    step_ms: float
    """To every decode step."""
    chunks_ms: float
    """To its prompt: decode steps in between, and prompts ahead of it."""
    overlap_ms: float
    """Taken off its prompt: what stages do at the same time."""


def groups_in_flight(batch: float, depth: int) -> int:
    """Decode groups that `batch` sequences make where `depth` may be in flight."""
    # Shares of routes that add up to a whole do so up to rounding.
    return max(1, min(depth, int(batch + 1e-9)))


def waits(
    stages: Sequence[StageWork],
    links_step_ms: float,
    links_chunk_ms: float,
    *,
    chunks: int,
    depth: int,
    groups: int,
    ahead: float,
    requests_per_s: float,
) -> Waits:
    """What a sequence of `chunks` chunks waits for on a route of these stages.

    `ahead`: how many prompts like its own must be prefilled first. `requests_per_s`: others that arrive meanwhile.
    """
    undisturbed_ms = sum(stage.step_ms for stage in stages) + links_step_ms
    # `groups` groups take turns on the busiest resource.
    pipelined_ms = max(undisturbed_ms, groups * _busiest(stages, [stage.step_ms for stage in stages]))
    chunk_ms = sum(stage.chunk_ms for stage in stages) + links_chunk_ms
    # Where stages share processors, chunk and decode step alternate on them: a step of the others runs before every
    # chunk but the first, which finds one half done. On processors of its own the step follows the chunk around.
    turns_ms = sum(
        before.beside_ms
        for before, stage in zip((stages[-1], *stages[:-1]), stages, strict=True)
        if before.resource == stage.resource
    )
    between_ms = (chunks - 0.5) * turns_ms
    # mathematics.md A1: (sum_s tau_s + (C-1)*max_s tau_s)/C, as far as `depth` chunks in flight can reach it.
    flight = max(1, min(depth, chunks))
    pace_ms = max(chunk_ms / flight, _busiest(stages, [stage.chunk_ms for stage in stages]))
    overlap_ms = (chunks - 1) * max(0.0, chunk_ms - pace_ms)
    prompt_ms = chunks * chunk_ms - overlap_ms + between_ms
    share = min(requests_per_s * prompt_ms / 1e3, RHO_COUNTED_MAX)
    queued_ms = queue_wait_ms(share, prompt_ms)
    step_ms = pipelined_ms
    if share > 0:
        # While a prompt is under way there is one step for each of its chunks.
        step_ms = max(step_ms, 1 / ((1 - share) / pipelined_ms + share * chunks / prompt_ms))
    return Waits(step_ms - undisturbed_ms, between_ms + ahead * prompt_ms + queued_ms, overlap_ms)


def resources(capacities: Sequence[Capacity]) -> list[int]:
    """A number for each node: the same where two share processors of which there are not enough for both."""
    found: list[int] = []
    for position, capacity in enumerate(capacities):
        alike = (k for k in range(position) if share_processors(capacity, capacities[k]))
        first = next(alike, None)
        found.append(position if first is None else found[first])
    return found


def share_processors(one: Capacity, other: Capacity) -> bool:
    """Whether two nodes hold each other up by computing at the same time: one node, or two on the same cores."""
    if one.node == other.node:
        return True
    if one.machine is None or one.machine != other.machine or "cuda" in (one.provider.name, other.provider.name):
        return False
    mine, theirs = set(one.cores), set(other.cores)
    return bool(mine & theirs) and one.threads + other.threads > len(mine | theirs)


def chunks_of(prompt_tokens: int, chunk_tokens: int) -> tuple[int, int]:
    """How many chunks a prompt makes, and the tokens of its last one."""
    chunks = max(1, ceil(prompt_tokens / chunk_tokens))
    return chunks, prompt_tokens - (chunks - 1) * chunk_tokens


def _busiest(stages: Sequence[StageWork], times_ms: Sequence[float]) -> float:
    busy: dict[int, float] = {}
    for stage, time_ms in zip(stages, times_ms, strict=True):
        busy[stage.resource] = busy.get(stage.resource, 0.0) + time_ms
    return max(busy.values())

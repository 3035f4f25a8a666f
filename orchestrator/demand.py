"""PURE: from the sequences that ran lately, and from what requests lately were, to how often requests arrive."""

from math import exp

from orchestrator.fold import Snapshot
from orchestrator.habits import Habit
from orchestrator.moving import Live
from profiler.forecast import forecast_on, surveyed
from profiler.host import Hosts
from profiler.objective import Demand
from schemas.base import DeploymentName, NodeId
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan

LOAD_S = 20.0
"""How many run is averaged over this: of requests that arrive at random three may run now where one does on average,
and a route for the three would be given back before it has paid."""
BISECTIONS = 10
"""The rate of arrivals is known to a thousandth of its range then."""


def running(snapshot: Snapshot, name: DeploymentName, current: Plan, manifest: Manifest, habit: Habit) -> Live:
    """The sequences of a plan that run now, from the heartbeats."""
    running: dict[int, int] = {}
    silent: set[int] = set()
    for node in current.nodes:
        stages = snapshot.nodes[NodeId(node)].capacity.stages
        here = [one.sequences for one in stages if one.deployment == name and one.epoch == current.epoch]
        for block in current.blocks_on(node):
            running[block] = running.get(block, 0) + sum(here)
        if not here:
            silent.update(current.blocks_on(node))
    # Every sequence runs each block once, and a node counts each of its own once whichever blocks it runs of it: on a
    # node that serves two routes a block also counts those that run it elsewhere. None counts fewer than there are but
    # one whose node has not reported this epoch yet.
    told = [count for block, count in running.items() if block not in silent]
    count = min(min(told, default=0), current.settings.max_sequences)
    if not count or manifest.kind is not ModelKind.DECODER:
        return Live()
    # On average a sequence is half way.
    half = habit.output_tokens / 2
    return Live(count, habit.prompt_tokens + half, half)


def averaged(before: float | None, count: int, elapsed_s: float) -> float:
    """How many sequences run on average, if `count` do now; `before` is the same at the look before, if there was
    one."""
    return count if before is None else before + (1 - exp(-max(0.0, elapsed_s) / LOAD_S)) * (count - before)


def demand_of(
    count: float,
    habit: Habit,
    current: Plan,
    seen: Hosts,
    steady: Hosts,
    manifest: Manifest,
) -> Demand:
    """How often requests of this habit arrive if `count` sequences run on average. By Little's law N that take E2E
    each arrive N/E2E a second, E2E being what they take in the queues that this rate makes: N = lambda *
    E2E(lambda) grows with lambda, so bisection finds it."""
    output_tokens, prompt_tokens = round(habit.output_tokens), round(habit.prompt_tokens)
    ground = surveyed(current.chains, seen, manifest, steady)

    def at(rate: float) -> Demand:
        return Demand(rate, output_tokens, max(1, count))

    def e2e_s(rate: float) -> float:
        found = forecast_on(ground, prompt_tokens, demand=at(rate), settings=current.settings)
        return found.e2e_ms / 1e3

    if count <= 0:
        return at(0.0)

    alone_s = e2e_s(0.0)
    low, high = 0.0, count / alone_s if alone_s > 0 else 0.0
    for _ in range(BISECTIONS if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * e2e_s(middle) <= count else (low, middle)
    return at(low)

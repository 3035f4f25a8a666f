"""PURE: what there is to do: how often requests arrive, what they lately were, and how many run at once."""

from math import exp

from orchestrator.fold import Snapshot
from orchestrator.habits import Habit
from orchestrator.moving import Live
from profiler.objective import Demand
from schemas.base import DeploymentName, NodeId
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan

LOAD_S = 20.0
"""How many run is averaged over this: of requests that arrive at random three may run now where one does on average,
and a route for the three would be given back before it has paid."""


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


def demand_of(rate: float, load: float, habit: Habit) -> Demand:
    """What `rate` requests a second of this habit ask for, while `load` sequences run on average: one figure for all
    plans, though the better one lets fewer run at once."""
    return Demand(rate, round(habit.output_tokens), max(1.0, load))

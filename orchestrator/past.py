"""PURE: how slow nodes were at times of the last minutes, so that a plan is not made for the moment alone.

What nodes do now says little about what they will do in a minute where they are slow now and then. A route that is just
fast enough while all of its nodes are well is too slow as soon as one of them is not, and then it is late to look for
another. So a plan is priced in the state of now, and in states that were: a second route is worth what it would have
saved then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from profiler.host import Host
from schemas.base import NodeId

APART = timedelta(seconds=60)
"""Between the states that are kept: most of what is slow now and then is so for longer."""
KEPT_MAX = 5
"""So that they are of five minutes."""
NOW_WEIGHT = 0.75
"""Of the state of now; those that were have the rest, in equal parts. A plan that is bad now and was so in no other
state counts as half as bad, and the work function leaves it one planning period later."""
WORST = 3.0
"""A bad state does not last: by the time that it has, another plan is in force."""
NOISE = 1.5
"""Less than this is noise (of 20 % a second two looks in a hundred are more): the node is as fast as it ever is."""

State = Mapping[NodeId, float]
"""How many times slower than with nothing else to do each node is of which that is known, where it is slow at all."""


@dataclass(frozen=True)
class Past:
    """States that were, the latest last."""

    states: tuple[tuple[datetime, State], ...] = ()


NONE_SEEN = Past()


def state_of(slowness: Mapping[NodeId, float]) -> State:
    """A state without what is noise."""
    return {node: factor if factor >= NOISE else 1.0 for node, factor in slowness.items()}


def remembered(before: Past, state: State, now: datetime) -> Past:
    """What is remembered after a look at `state`."""
    last = before.states[-1][0] if before.states else None
    if last is not None and last <= now < last + APART:
        return before
    return Past((*before.states, (now, state))[-KEPT_MAX:])


def weighed(past: Past, now: State) -> Sequence[tuple[float, State]]:
    """The states to price a plan in, with weights that add up to 1: that of now first, each other one once. A state
    says how many times slower than now each node is in it; a node that it does not name is as now."""
    counts: dict[tuple[tuple[NodeId, float], ...], int] = {}
    for _, state in past.states:
        changed = {node: factor / now[node] for node, factor in state.items() if node in now and factor != now[node]}
        key = tuple(sorted(changed.items()))
        counts[key] = counts.get(key, 0) + 1
    same = counts.pop((), 0)
    total = same + sum(counts.values())
    if not counts:
        return [(1.0, {})]
    each = (1 - NOW_WEIGHT) / total
    return [(NOW_WEIGHT + each * same, {}), *((each * count, dict(key)) for key, count in counts.items())]


def changed(hosts: Mapping[NodeId, Host], state: State) -> dict[NodeId, Host]:
    """Nodes as they are now, as they are in a state."""
    return {node: host.slower(state[node]) if node in state else host for node, host in hosts.items()}


def fastest(states: Sequence[tuple[float, State]]) -> State:
    """How many times slower than now each node is in the state in which it is fastest, if that is not now."""
    least: dict[NodeId, float] = {}
    for _, state in states:
        for node, factor in state.items():
            least[node] = min(least.get(node, 1.0), factor)
    return least


def added_by(phis: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """What the states that were add to the Phi of now of each plan; `phis` is that of each plan in each state, now
    first. A state in which another plan is much better is left for that one, so that no plan counts there for more than
    `WORST` times the best."""
    least = [min(column) for column in zip(*phis, strict=True)]
    return [
        sum(
            weight * (min(phi, WORST * best) - own[0])
            for weight, phi, best in zip(weights[1:], own[1:], least[1:], strict=True)
        )
        for own in phis
    ]

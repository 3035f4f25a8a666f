"""PURE: what a plan would cost were one of its nodes slow, so that no plan is made for the moment alone.

What nodes do now says little about what they will do in a minute. A route that is just fast enough while all of its
nodes are well is too slow as soon as one of them is not, and then it is late to look for another. So a plan is priced
with its nodes as they are and, one after the other, with each of them slow: a second route, over nodes of its own, is
worth what it saves then.
"""

from collections.abc import Mapping, Sequence

from schemas.base import NodeId

CHANCE = 0.05
"""How much each of these states counts: as if a node were slow a twentieth of the time, whoever it is."""
SLOWED = 3.0
"""How many times slower than with nothing else to do a slow node is."""
WORST = 3.0
"""A bad state does not last: by the time that it has, another plan is in force. So no plan counts in one for more than
this many times the best there is then."""


def slowing(slowness: float | None) -> float:
    """How many times slower than now a node would be were it slow; None: it does not say how slow it is now."""
    return max(1.0, SLOWED / max(1.0, slowness or 1.0))


def risks(phis: Sequence[float], slowed: Sequence[Mapping[NodeId, float]], load: float) -> list[float]:
    """What to add to the Phi of each plan: `phis` are what they cost as nodes are, `slowed` what each would cost were
    one of its nodes slow. A plan without a node costs the same whatever that does. `load` is how many sequences run on
    average: where none does, nothing is at risk."""
    nodes = {node for one in slowed for node in one}
    least = {node: min(one.get(node, phi) for phi, one in zip(phis, slowed, strict=True)) for node in nodes}
    chance = CHANCE * min(1.0, load)
    return [
        chance * sum(max(0.0, min(worse, WORST * least[node]) - phi) for node, worse in one.items())
        for phi, one in zip(phis, slowed, strict=True)
    ]

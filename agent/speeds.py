"""How fast nodes say that they run their blocks now: what an ingress goes by on routes that it has not used lately."""

from dataclasses import dataclass

from schemas.base import Digest, NodeId
from schemas.capacity import Capacity
from schemas.plan import Route

STAGES_MAX = 1024
"""Stages whose speed is kept: of plans that are over nobody asks again."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What the stages of a route take together, in seconds."""

    step_s: float
    """One decode step of one sequence."""
    token_s: float
    """One token of a prompt."""
    busiest_token_s: float
    """The same on the node that takes longest."""


class Speeds:
    """What heartbeats said last."""

    def __init__(self) -> None:
        self._said: dict[NodeId, Capacity] = {}
        self._found: dict[tuple[NodeId, Digest, int, int], tuple[Capacity | None, Speed | None]] = {}
        """Of stages, and what their nodes had said then."""

    def heard(self, capacity: Capacity) -> None:
        """A heartbeat, of this node or another."""
        self._said[capacity.node] = capacity

    def of(self, model: Digest, route: Route) -> Speed | None:
        """Of a whole route; None while some node of it has not said."""
        step_s = token_s = 0.0
        by_node: dict[NodeId, float] = {}
        for stage in route.stages:
            found = self._of_stage(stage.node, model, stage.first, stage.last)
            if found is None:
                return None
            step_s, token_s = step_s + found.step_s, token_s + found.token_s
            by_node[stage.node] = by_node.get(stage.node, 0.0) + found.token_s
        return Speed(step_s, token_s, max(by_node.values()))

    def _of_stage(self, node: NodeId, model: Digest, first: int, last: int) -> Speed | None:
        capacity, key = self._said.get(node), (node, model, first, last)
        then, found = self._found.get(key, (None, None))
        if then is not capacity:
            found = None if capacity is None else _said_by(capacity, model, first, last)
            if len(self._found) >= STAGES_MAX:
                self._found.clear()
            self._found[key] = (capacity, found)
        return found


def _said_by(capacity: Capacity, model: Digest, first: int, last: int) -> Speed | None:
    own = [time for time in capacity.block_times if time.model == model and first <= time.block <= last]
    if len(own) <= last - first:
        return None
    # The times of a node at rest are those of when it loaded its blocks.
    slower = (capacity.contention or 1.0) / 1e3
    token_s = slower * sum(time.prefill_ms_per_token for time in own)
    return Speed(slower * sum(time.decode_ms for time in own), token_s, token_s)

"""How fast nodes say that they run their blocks now: what an ingress goes by on routes that it has not used lately."""

from dataclasses import dataclass

from schemas.base import Digest, NodeId
from schemas.heartbeat import Hosting
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
        self._said: dict[NodeId, Hosting] = {}
        self._found: dict[tuple[NodeId, Digest, int, int], tuple[Hosting | None, Speed | None]] = {}
        """Of stages, and what their nodes had said then."""

    def heard(self, node: NodeId, hosting: Hosting) -> None:
        """What a heartbeat said, of this node or another."""
        self._said[node] = hosting

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
        hosting, key = self._said.get(node), (node, model, first, last)
        then, found = self._found.get(key, (None, None))
        if then is not hosting:
            found = None if hosting is None else _said_by(hosting, model, first, last)
            if len(self._found) >= STAGES_MAX:
                self._found.clear()
            self._found[key] = (hosting, found)
        return found


def _said_by(hosting: Hosting, model: Digest, first: int, last: int) -> Speed | None:
    own = [time for time in hosting.block_times if time.model == model and first <= time.block <= last]
    if len(own) <= last - first:
        return None
    # The times of a node at rest are those of when it loaded its blocks.
    slower = (hosting.contention or 1.0) / 1e3
    token_s = slower * sum(time.prefill_ms_per_token for time in own)
    return Speed(slower * sum(time.decode_ms for time in own), token_s, token_s)

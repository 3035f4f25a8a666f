"""Which processes of its peers a simulated process hears: `agent.neighbours`, where asking takes virtual time."""

from collections.abc import Callable

from agent.neighbours import Neighbours
from schemas.base import NodeId


class SimNeighbours(Neighbours):
    """Asks the broker in virtual time."""

    def __init__(
        self,
        node: NodeId,
        boot: str,
        now: Callable[[], float],
        look_for: Callable[[NodeId], None],
        on_replaced: Callable[[NodeId], None],
    ) -> None:
        async def probe(_: NodeId) -> None:
            raise AssertionError("it is asked for in virtual time")

        super().__init__(node, boot, now, probe, on_replaced, lambda _: None)
        self._ask = look_for

    def look_for(self, node: NodeId) -> None:
        self._ask(node)

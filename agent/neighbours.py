"""Which processes of its peers a node hears, and which of them are over.

A node that restarted is not the node it was: what its earlier process drove or held is lost. A link that ends says at
once that something did; whether the process ended is the broker's word, which it gives for a subject that nobody
listens to any more.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable

from nats.errors import Error as NatsError

from agent.numbers import boot_number, boot_number_of
from schemas.base import NodeId
from schemas.capacity import HEARTBEAT_SPARE_S, LostPeer
from schemas.frame import SequenceId
from schemas.heartbeat import Presence

PROBE_PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The broker may take a moment to notice what a link shows at once."""
SILENT_S = 3 * HEARTBEAT_SPARE_S
"""A process that said nothing for three heartbeats is over, whatever else is known of it."""
IN_FLIGHT_S = 0.5
"""A heartbeat that comes this soon after the end of who sent it says nothing: it was on its way."""
NOBODY = -1
"""The number of no process."""
BOOTS_KEPT = 32
"""Processes of a peer that are remembered as over."""


class Neighbours:
    """The peers of one process of a node, as it hears them. On the event loop."""

    def __init__(
        self,
        node: NodeId,
        boot: str,
        now: Callable[[], float],
        probe: Callable[[NodeId], Awaitable[None]],
        on_replaced: Callable[[NodeId], None],
        on_alive: Callable[[NodeId], None],
    ) -> None:
        """`probe` asks the broker for a peer; its answer, if nobody listens there, comes to `lose`. `on_replaced`: a
        peer's earlier process is over; `on_alive`: one that was looked for is there all the same."""
        self._node = node
        self._boot = boot
        self._now = now
        self._probe = probe
        self._on_replaced = on_replaced
        self._on_alive = on_alive
        self._started_at = now()
        self._boots: dict[NodeId, dict[str, int]] = {}
        """Each peer's processes, the present one last, and the last heartbeat of each."""
        self._own_number = boot_number(node, boot)
        self._numbered: dict[tuple[NodeId, int], str] = {}
        """The same processes, by their numbers (`agent.numbers`)."""
        self._heard_at: dict[NodeId, float] = {}
        self._lost: dict[NodeId, str] = {}
        """Peers that are gone, and the process of each that is."""
        self._declared_lost: dict[NodeId, str | None] = {}
        """Peers that the orchestrator held for lost and that were not heard since, and the process of each; None where
        this node had heard none yet, and it was whichever there was."""
        self._lost_at: dict[NodeId, float] = {}
        self._suspected: dict[NodeId, asyncio.Task[None]] = {}

    @property
    def lost(self) -> tuple[LostPeer, ...]:
        """Peers found gone that are not back."""
        return tuple(LostPeer(node=peer, boot=boot) for peer, boot in self._lost.items())

    def heard(self, presence: Presence) -> bool:
        """Take in a peer's heartbeat; False if it was overtaken: anybody may replay an old one."""
        boots = self._boots.setdefault(presence.node, {})
        is_known, is_last = presence.boot in boots, next(reversed(boots), None) == presence.boot
        if is_known and not (is_last and presence.sequence > boots[presence.boot]):
            return False
        if boots and not is_known:
            self._on_replaced(presence.node)
            if len(boots) >= BOOTS_KEPT:
                oldest = next(iter(boots))
                del boots[oldest], self._numbered[presence.node, boot_number(presence.node, oldest)]
        if not is_known:
            self._numbered[presence.node, boot_number(presence.node, presence.boot)] = presence.boot
        boots[presence.boot] = presence.sequence
        self._heard_at[presence.node] = self._now()
        lost_at = self._lost_at.get(presence.node)
        if lost_at is None or self._now() - lost_at >= IN_FLIGHT_S:
            self._lost.pop(presence.node, None)
            self._declared_lost.pop(presence.node, None)
        elif self._declared_lost.get(presence.node, "") is None:
            self._declared_lost[presence.node] = presence.boot
        for lost in presence.lost_peers:
            # It may have driven sequences here, or left requests, though no plan of this node has it any more.
            if lost.boot == self._present_boot(lost.node) != self._lost.get(lost.node):
                self.look_for(lost.node)
        return True

    @property
    def numbers(self) -> dict[NodeId, int]:
        """The number of each node's present process (`agent.numbers`), as far as it was heard; `NOBODY` where it was
        found gone."""
        found = {
            node: number if self._lost.get(node) != boot else NOBODY
            for (node, number), boot in self._numbered.items()
            if boot == self._present_boot(node)
        }
        return found | {self._node: self._own_number}

    def is_gone(self, node: NodeId, sequence: SequenceId) -> bool:
        """Whether the process of `node` that drove a sequence was replaced by another: what it had sent may come even
        then, and would hold what nobody gives back. One that was only found gone may be cut off from the bus and drive
        on over its links."""
        number = boot_number_of(sequence)
        if node == self._node:
            return number != self._own_number
        boot = self._numbered.get((node, number))
        return boot is not None and boot != self._present_boot(node)

    def declared(self, nodes: Iterable[NodeId]) -> None:
        """The orchestrator holds these for lost."""
        for node in nodes:
            self._declared_lost[node] = self._present_boot(node)
            self._lost_at[node] = self._now()

    def look_for(self, node: NodeId) -> None:
        """Find out whether a peer's process ended."""
        if node not in self._suspected and node != self._node:
            self._suspected[node] = asyncio.get_running_loop().create_task(self._find_out(node))

    def lose(self, node: NodeId) -> bool:
        """Nobody listens at a peer any more; True if that is news."""
        boot = self._present_boot(node)
        if boot is None or self._lost.get(node) == boot:
            return False
        self._lost[node] = boot
        self._lost_at[node] = self._now()
        return True

    def is_over(self, node: NodeId, boot: str) -> bool:
        """Whether a process has ended: there is a later one, it was found gone, or nobody has ever heard of it."""
        if node == self._node:
            return boot != self._boot
        present = self._present_boot(node)
        silent_s = self._now() - self._heard_at.get(node, self._started_at)
        if present not in (None, boot) or silent_s > SILENT_S:
            return True
        declared = self._declared_lost.get(node, "")
        return declared is None or boot in (self._lost.get(node), declared)

    async def _find_out(self, node: NodeId) -> None:
        try:
            for pause_s in PROBE_PAUSES_S:
                await asyncio.sleep(pause_s)
                if node in self._lost:
                    return
                with contextlib.suppress(NatsError):
                    await self._probe(node)
            self._on_alive(node)
        finally:
            del self._suspected[node]

    def _present_boot(self, node: NodeId) -> str | None:
        """The process of a peer that was heard last."""
        return next(reversed(self._boots.get(node, {})), None)

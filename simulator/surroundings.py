"""What a process of the world can see and do beside itself; `simulator.world.World` is it."""

from datetime import datetime
from typing import Protocol

from schemas.base import NodeId
from schemas.capacity import LinkEstimate
from schemas.frame import Frame
from schemas.section import SeenPlan
from simulator.books import Books
from simulator.bus import Bus
from simulator.draws import Draws
from simulator.journal import Stream
from simulator.kernel import Kernel
from simulator.machine import Machine
from simulator.model import Physics
from simulator.scenario import Scenario
from simulator.trail import Trail


class Surroundings(Protocol):
    """The bus, the links, the stored streams, and who keeps the books."""

    scenario: Scenario
    physics: Physics
    kernel: Kernel
    draws: Draws
    journal: Stream
    trail: Trail
    bus: Bus
    books: Books
    hands_over: bool
    makes_before_breaks: bool

    def frame(self, source: NodeId, target: NodeId, frame: Frame, size: float, /) -> None: ...
    def is_alive(self, node: NodeId, /) -> bool: ...
    def peers(self, machine: Machine, /) -> tuple[NodeId, ...]: ...
    def estimate(self, machine: Machine, peer: NodeId, noise: float, /) -> LinkEstimate | None: ...
    def fetch_s(self, machine: Machine, size: float, /) -> float: ...
    def date_at(self, machine: Machine, /) -> datetime: ...
    def loads(self, machine: Machine, plan: SeenPlan, /) -> None: ...
    def read_plans(self, node: NodeId, /) -> None: ...

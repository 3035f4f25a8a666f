"""Blocks that a simulated process brings to its node's disk ahead of need, as `agent.staging` does: one after another,
resting as long as each took, while no plan is being loaded."""

from collections.abc import Callable, Collection

from agent.staging import BUSY_LOOK_S
from simulator.machine import Machine
from simulator.surroundings import Surroundings


class Stager:
    """Of one process."""

    def __init__(self, machine: Machine, around: Surroundings, is_busy: Callable[[], bool]) -> None:
        """`is_busy`: whether a plan is being loaded."""
        self._machine = machine
        self._around = around
        self._is_busy = is_busy
        self._wanted: tuple[int, ...] = ()
        self._at_it = False

    def want(self, blocks: Collection[int]) -> None:
        """What is to be on the disk, from now on."""
        self._wanted = tuple(sorted(blocks))
        if not self._at_it:
            self._go_on()

    def _go_on(self) -> None:
        block = next((one for one in self._wanted if one not in self._machine.disk), None)
        self._at_it = block is not None
        if block is None:
            return
        if self._is_busy():
            self._machine.later(BUSY_LOOK_S, self._go_on)
            return
        size = self._around.physics.manifest.blocks[block].weight_bytes
        self._around.books.moved(size)

        def brought() -> None:
            self._machine.disk.add(block)
            self._go_on()

        self._machine.later(2 * self._around.fetch_s(self._machine, size), brought)

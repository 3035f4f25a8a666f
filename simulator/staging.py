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
        self._wanted: frozenset[int] = frozenset()
        self._foreseen: frozenset[int] = frozenset()
        self._at_it = False

    def want(self, blocks: Collection[int]) -> None:
        """What the leader wants on the disk from now on."""
        self._wanted = frozenset(blocks)
        self._begin()

    def foresee(self, blocks: Collection[int]) -> None:
        """What somebody who knows the run wants there, whatever the leader does."""
        self._foreseen |= frozenset(blocks)
        self._begin()

    def _begin(self) -> None:
        if not self._at_it:
            self._go_on()

    def _go_on(self) -> None:
        block = min((self._wanted | self._foreseen) - self._machine.disk, default=None)
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

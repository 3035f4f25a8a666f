"""A machine of the world: whether a process runs on it, whether that hangs, and how fast it is now."""

from collections import deque
from collections.abc import Callable

from schemas.base import NodeId
from simulator.kernel import Kernel
from simulator.scenario import NodeSpec


class Machine:
    """What is done on it waits while it hangs, and is lost when it dies."""

    def __init__(self, name: NodeId, site: str, spec: NodeSpec, kernel: Kernel) -> None:
        self.name = name
        self.site = site
        self.spec = spec
        self.alive = False
        self.hangs = False
        self.life = 0
        """Of its process: what was meant for an earlier one does not reach this one."""
        self.factor = 1.0
        """How many times longer than undisturbed it takes for everything."""
        self.throttled = False
        self.lie = 1.0
        """How many times longer things truly take than it says."""
        self.disk: set[int] = set()
        """Blocks whose files it has; a restart leaves them."""
        self._kernel = kernel
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def start(self) -> None:
        self.alive, self.hangs = True, False
        self.life += 1
        self._waiting.clear()

    def kill(self) -> None:
        self.alive, self.hangs = False, False
        self._waiting.clear()

    def hang(self) -> None:
        self.hangs = self.alive

    def go_on(self) -> None:
        self.hangs = False
        while self._waiting and not self.hangs:
            life, call = self._waiting.popleft()
            if life == self.life and self.alive:
                call()

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Do it then, in the process that runs now or never."""
        self._kernel.after(delay_s, self.reach, call, self.life)

    def every(self, period_s: Callable[[], float], call: Callable[[], None], first_s: float) -> None:
        """Do it again and again while this process lives."""

        def again() -> None:
            call()
            self.later(period_s(), again)

        self.later(first_s, again)

    def reach(self, call: Callable[[], None], life: int | None = None) -> bool:
        """Do it now, or once it hangs no more; False if that process is gone."""
        if not self.alive or (life is not None and life != self.life):
            return False
        if self.hangs:
            self._waiting.append((self.life, call))
        else:
            call()
        return True

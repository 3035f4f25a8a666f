"""The roads between machines: how long a message is on its way, one behind the other on each pair's link."""

import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from schemas.base import NodeId
from simulator.kernel import Kernel
from simulator.machine import Machine
from simulator.scenario import LinkSpec, NetworkSpec
from simulator.truth import Truth

FRAME_BYTES = 300
"""Around what a frame carries."""
USER_TIMEOUT_S = 2.0
"""For so long a link sends again what is not acknowledged (`agent.links`); then it is given up, and what it holds."""
DRAWS = 4096
"""Jitter is drawn this often at once; drawing one at a time would be most of the work."""


class Network:
    """Links as the scenario has them, as good as the truth makes them at the time."""

    def __init__(
        self,
        spec: NetworkSpec,
        truth: Truth,
        machines: Mapping[NodeId, Machine],
        kernel: Kernel,
        rng: np.random.Generator,
    ) -> None:
        self._spec = spec
        self._truth = truth
        self._machines = machines
        self._kernel = kernel
        self._rng = rng
        self._jitters: list[float] = []
        self._links: dict[tuple[NodeId, NodeId], tuple[float, float]] = {}
        """When a link is done with what it was given, and when the last of that arrives."""
        self._held: list[tuple[float, NodeId, NodeId, Callable[[], None], int]] = []
        """What was on its way when nothing could pass, since when and for which life of its target, in order."""
        self.cut: Counter[NodeId] = Counter()
        """Machines that nothing reaches, and how many cuts are in force at each."""
        self.sent_bytes = 0.0

    def spec_of(self, a: Machine, b: Machine) -> LinkSpec:
        if a.site == b.site:
            return self._spec.within
        return self._spec.cloud if "cloud" in (a.spec.tier, b.spec.tier) else self._spec.between

    def rtt_s(self, a: Machine, b: Machine) -> float:
        return self.spec_of(a, b).rtt_ms / 1e3

    def bytes_per_s(self, a: Machine, b: Machine) -> float:
        """What the link truly gives now."""
        return self.spec_of(a, b).mbit_per_s * 1e6 / 8 / self._truth.path_factor(a.name, b.name, self._kernel.now)

    def reaches(self, a: NodeId, b: NodeId) -> bool:
        return a == b or not (a in self.cut or b in self.cut)

    def send(self, source: NodeId, target: NodeId, size: float, call: Callable[[], None]) -> None:
        """Do `call` on `target` once so many bytes are there; never, if it dies, or nothing reaches it."""
        a, b = self._machines[source], self._machines[target]
        if source == target:
            a.later(0.0, call)
            return
        now, life = self._kernel.now, b.life
        if not self.reaches(source, target):
            self._held.append((now, source, target, call, life))
            return
        link = self.spec_of(a, b)
        sending_s = (size + FRAME_BYTES) / self.bytes_per_s(a, b)
        free_at, last_at = self._links.get((source, target), (0.0, 0.0))
        sent_at = max(now, free_at) + sending_s
        self.sent_bytes += size
        # What is sent later never overtakes: a link is a stream.
        arrives = max(sent_at + link.rtt_ms / 2e3 * self._jitter(link.jitter), last_at)
        self._links[source, target] = (sent_at, arrives)
        self._kernel.at(arrives, self._arrive, now, source, target, call, life)

    def _arrive(self, sent: float, source: NodeId, target: NodeId, call: Callable[[], None], life: int) -> None:
        if self.reaches(source, target):
            self._machines[target].reach(call, life)
        else:
            self._held.append((sent, source, target, call, life))

    def cut_off(self, node: NodeId) -> None:
        """Nothing reaches it from now on."""
        self.cut[node] += 1

    def mended(self, node: NodeId) -> None:
        """One cut is over. Where it was the last: what links still hold arrives, in order; what is older they have
        given up."""
        self.cut[node] -= 1
        if not self.cut[node]:
            del self.cut[node]
        held, self._held = self._held, []
        for sent, source, target, call, life in held:
            if not self.reaches(source, target):
                self._held.append((sent, source, target, call, life))
            elif self._kernel.now - sent <= USER_TIMEOUT_S:
                self._kernel.after(0.0, self._machines[target].reach, call, life)

    def _jitter(self, spread: float) -> float:
        if spread == 0:
            return 1.0
        if not self._jitters:
            self._jitters = self._rng.standard_normal(DRAWS).tolist()
        return math.exp(spread * self._jitters.pop())

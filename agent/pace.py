"""PURE: how fast a route is, from the calls that came back over it."""

from dataclasses import dataclass, field

FRESH_S = 30.0
"""Older evidence is none."""
HALF_LIFE_S = 5.0
"""Evidence this old counts half of what is new."""
CALLS_MIN = 3
"""Before calls of a kind say anything: the first one on a cold machine is slow."""


@dataclass(slots=True)
class Timing:
    """What calls of one kind lately took, as a line over their size: least squares, the new ones counting more."""

    calls: int = 0
    last: float = 0.0
    """When the last one was answered."""
    _w: float = 0.0
    _wx: float = 0.0
    _wy: float = 0.0
    _wxx: float = 0.0
    _wxy: float = 0.0

    def add(self, size: int, took_s: float, now: float) -> None:
        """A call of this size took so long, and was answered `now`."""
        age_s = now - self.last
        fade = 0.5 ** (age_s / HALF_LIFE_S) if self.calls and age_s < FRESH_S else 0.0
        self.calls = self.calls + 1 if fade else 1
        self.last = now
        self._w = fade * self._w + 1.0
        self._wx = fade * self._wx + size
        self._wy = fade * self._wy + took_s
        self._wxx = fade * self._wxx + size * size
        self._wxy = fade * self._wxy + size * took_s

    def is_known(self, now: float) -> bool:
        """Whether there is evidence, and fresh."""
        return self.calls >= CALLS_MIN and now - self.last < FRESH_S

    def seconds(self, size: float) -> float:
        """What a call of this size takes; there must be evidence. Neither a larger call nor an empty one takes less
        than nothing more: slope and intercept are at least 0."""
        x, y = self._wx / self._w, self._wy / self._w
        spread = self._wxx / self._w - x * x
        slope = (self._wxy / self._w - x * y) / spread if spread > 1e-6 * x * x else 0.0
        return y + min(max(0.0, slope), y / x) * (size - x)


@dataclass(slots=True)
class Pace:
    """The timings of one route as its ingress sees them: from sending a frame to its answer, queues included."""

    chunk: Timing = field(default_factory=Timing)
    """Prefill, over tokens."""
    step: Timing = field(default_factory=Timing)
    """Decode, over sequences in the group."""
    call: Timing = field(default_factory=Timing)
    """Of a model without caches; all count as of one size."""

    def generates(self, now: float) -> bool:
        """Whether it is known how fast tokens come."""
        return self.chunk.is_known(now) and self.step.is_known(now)

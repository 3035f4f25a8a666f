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

    def is_known(self, now: float, fresh_s: float = FRESH_S) -> bool:
        """Whether there is evidence, and none of it older than that."""
        return self.calls >= CALLS_MIN and now - self.last < fresh_s

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
    """Prefill, over tokens: a chunk that follows no other."""
    gap: Timing = field(default_factory=Timing)
    """The same of one that follows another: what its busiest stage, or the number that may be on their way, allows."""
    step: Timing = field(default_factory=Timing)
    """Decode, over sequences in the group."""
    call: Timing = field(default_factory=Timing)
    """Of a model without caches; all count as of one size."""

    def generates(self, now: float, fresh_s: float = FRESH_S) -> bool:
        """Whether it is known how fast tokens come."""
        return self.chunk.is_known(now, fresh_s) and self.step.is_known(now, fresh_s)

    @property
    def last(self) -> float:
        """When the older part of the evidence came."""
        return min(self.chunk.last, self.step.last)

    def chunk_took(self, tokens: int, took_s: float, ahead: int, behind_s: float, now: float) -> None:
        """A prefill chunk was answered `now`, `took_s` after it was sent behind `ahead` others, and `behind_s` after
        the one before it, or after it was sent itself."""
        if ahead:
            self.gap.add(tokens, behind_s, now)
            if not self.gap.is_known(now):
                return
            took_s = max(behind_s, took_s - ahead * self.gap.seconds(tokens))
        self.chunk.add(tokens, took_s, now)

    def chunk_s(self, tokens: int) -> float:
        """A prefill chunk of so many tokens by itself; there must be evidence."""
        return self.chunk.seconds(tokens)

    def gap_s(self, tokens: int) -> float:
        """How long after another one it is through."""
        alone_s = self.chunk_s(tokens)
        return min(alone_s, self.gap.seconds(tokens)) if self.gap.calls >= CALLS_MIN else alone_s

    def step_s(self, sequences: int) -> float:
        """A decode step of so many sequences; there must be evidence."""
        return self.step.seconds(sequences)


@dataclass(frozen=True, slots=True)
class Likened:
    """The pace of a route that was not used lately: that of another, and what its nodes say that they take more."""

    like: Pace
    more_step_s: float
    more_token_s: float
    more_gap_s: float
    """For each token."""

    def chunk_s(self, tokens: int) -> float:
        """As for `Pace`; what is less than none takes a tenth."""
        known_s = self.like.chunk_s(tokens)
        return max(0.1 * known_s, known_s + self.more_token_s * tokens)

    def gap_s(self, tokens: int) -> float:
        """The same."""
        known_s = self.like.gap_s(tokens)
        return max(0.1 * known_s, known_s + self.more_gap_s * tokens)

    def step_s(self, sequences: int) -> float:
        """The same."""
        known_s = self.like.step_s(sequences)
        return max(0.1 * known_s, known_s + self.more_step_s)

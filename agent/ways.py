"""PURE: how a live sequence leaves a plan that drains: handed over, computed anew, or not at all, by predicted cost.

    hand-over   hold + (slowdown + lag) * bytes/rate    copied while it decodes on, then held for the last tokens
    recompute   chunks * t_prefill * (1 + beside) + known * t_replay
                                                        it stands still meanwhile (`fast`: everything is chunks)
    stay        (slowdown + lag) * tokens_to_come * t_step
                                                        it stands still for nothing; the old epoch lives longer
    lag         1 - t_step on the new route / t_step    by how much it falls behind while it decodes where it was

In seconds of a sequence that stands still, as `pause` and `slowdown` of `orchestrator.moving` weigh them
(mathematics.md A4: the cheapest of KV transfer, recompute and drain). A plan that is no faster is left for other
reasons; there nothing lags.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil

SLOWDOWN = 0.1
"""What a second of copying, or of an old epoch beside the new one, costs against one of standing still."""


class Way(StrEnum):
    """How a live sequence crosses to the next epoch."""

    HAND_OVER = "hand-over"
    RECOMPUTE = "recompute"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class Position:
    """Where one sequence stands, and what everything lately took where it runs. Times in seconds."""

    prompt_tokens: int
    known_tokens: int
    """That came out of it."""
    tokens_to_come: int
    """At most."""
    moved_bytes_per_token: int
    """Of the caches of the blocks that are elsewhere on the new route."""
    chunk_tokens: int
    step_s: float
    """A decode step on the old route."""
    new_step_s: float
    """The same on the new one."""
    prefill_s: float
    """A chunk on the new one."""
    replay_s: float
    """A known token that is replayed there."""
    hold_s: float
    """From the hold at a token boundary to the first step over the new route."""
    bytes_per_s: float
    beside: int
    """Sequences that the new route is computing anew already: their prompts come first."""
    exact: bool
    """Whether tokens that came out are replayed rather than prefilled."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The cheapest way, and what each was predicted to cost."""

    way: Way
    seconds: Mapping[Way, float]

    @property
    def terms(self) -> dict[str, float | str]:
        """What an audit event shows of it, in milliseconds."""
        shown = {f"{way.name.lower()}_ms": round(1e3 * cost, 3) for way, cost in self.seconds.items()}
        return {"way": self.way.value, **shown}


def choose(at: Position) -> Choice:
    """The cheapest way from `at`; of equals the one that copies, then the one that stays."""
    tokens = at.prompt_tokens + at.known_tokens
    chunks = ceil((at.prompt_tokens if at.exact else tokens) / at.chunk_tokens)
    replayed_s = at.known_tokens * at.replay_s if at.exact else 0.0
    behind = SLOWDOWN + (max(0.0, 1 - at.new_step_s / at.step_s) if at.step_s > 0 else 0.0)
    seconds = {
        Way.HAND_OVER: at.hold_s + behind * at.moved_bytes_per_token * tokens / at.bytes_per_s,
        Way.STAY: behind * at.tokens_to_come * at.step_s,
        Way.RECOMPUTE: chunks * at.prefill_s * (1 + at.beside) + replayed_s,
    }
    return Choice(min(seconds, key=lambda way: seconds[way]), seconds)

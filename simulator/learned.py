"""A learned policy: a small network scores every other plan, and the best of those above 0 is moved to.

What is not the rule is production's (`orchestrator.trigger.decided`): hard triggers, placements that are pinned, the
migration budget, and what is written down of a decision. The score is s(x) = w.f(x) + b + v.tanh(W f(x) + c) over the
features f of `FEATURES`. The numbers come from a file that `simulator.learning` writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from math import log1p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from orchestrator.decision import Action, Decision, Observation, Option
from orchestrator.trigger import BURN_MAX, TriggerState, Verdict, decided
from schemas.base import Value
from schemas.errors import ErrorCode, ResplitError

Floats = NDArray[np.float64]

SHIPPED = Path(__file__).parent / "learned.json"
FILE_BYTES_MAX = 1 << 20
FEATURES = (
    "gain",  # of Phi, relative to that of the current plan; so are the next three
    "smoothed gain",
    "headroom",  # of the current plan above the bound
    "distance to the bound",
    "price",  # of the move, in seconds of the current Phi, as a logarithm; likewise the next three, in s and MB
    "pause",
    "seconds",
    "bytes",
    "cooling",  # 1 at a move, 0 a minute later
    "rest",  # minutes since the last move, as a logarithm
    "debt",
    "redistributes",
    "re-splits",
    "changes routes",
    "routes",
    "burn",
)
HIDDEN = 4
COUNT = len(FEATURES) * (HIDDEN + 1) + 2 * HIDDEN + 1
"""Of the numbers: w, b, W, c, v."""
SMOOTHING = 0.3
"""Weight of the newest Phi in its mean, as the threshold rule has it."""
GAIN = 0.2
COOLDOWN_S = 60.0
LIMIT = 3.0
"""No feature is beyond this, whatever was measured."""


class Generation(Value):
    """One step of the training: rewards of the neighbours, each a mean over worlds that change from step to step."""

    mean: float
    best: float
    worst: float


class Training(Value):
    """How the numbers came about."""

    command: str
    seeds: tuple[int, int]
    """Of the worlds it was trained in, both included."""
    generations: tuple[Generation, ...]


class Parameters(Value):
    """The file."""

    features: tuple[str, ...]
    hidden: int
    values: tuple[float, ...] = Field(max_length=10_000)
    """w, b, W by rows, c, v."""
    training: Training

    @model_validator(mode="after")
    def _fits_the_network(self) -> "Parameters":
        if self.features != FEATURES or self.hidden != HIDDEN:
            raise ValueError("features, hidden: these are of another network than this version has")
        if len(self.values) != COUNT:
            raise ValueError(f"values: these are {len(self.values)} numbers and the network has {COUNT}")
        if not np.isfinite(self.values).all():
            raise ValueError("values: some are no finite numbers")
        return self


@dataclass(frozen=True)
class Learned:
    """The policy of some numbers, `COUNT` of them in the order of the file."""

    values: tuple[float, ...]

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        rest_s = None if state.moved_at is None else (now - state.moved_at).total_seconds()

        def rule(state: TriggerState, seen: Observation, elapsed_s: float, scale: float) -> Verdict:
            means = {x.key: _mean(state, x) for x in seen.options}
            scores = {x.key: self.score(features(x, seen, means, scale, rest_s)) for x in seen.options[1:]}
            best = min(seen.options[1:], key=lambda x: (-scores[x.key], x.phi, x.key))
            fired = (best,) if scores[best.key] > 0 else ()
            return Verdict(means, fired, f"its learned score, {scores[best.key]:.2f}, is the best above 0")

        return decided(state, observation, now, None, 0.0, rule)

    def score(self, found: Floats) -> float:
        """s(x) of features `found`, [F]."""
        size = len(FEATURES)
        numbers = np.asarray(self.values)
        w, b, rest = numbers[:size], numbers[size], numbers[size + 1 :]
        inner, c, v = rest[: HIDDEN * size].reshape(HIDDEN, size), rest[HIDDEN * size : -HIDDEN], rest[-HIDDEN:]
        return float(w @ found + b + v @ np.tanh(inner @ found + c))


def features(
    option: Option, seen: Observation, means: Mapping[str, float], scale: float, rest_s: float | None
) -> Floats:
    """What the network is told of one option, [F], in the order of `FEATURES`, given the mean Phi of each; `rest_s` is
    since the last move."""
    here = seen.current
    unit = max(here.phi, 1e-9)
    move, kind = seen.moves[here.key, option.key], option.action_from(here)
    rest_s = 10 * COOLDOWN_S if rest_s is None else rest_s
    found = (
        (here.phi - option.phi) / unit,
        1 - means[option.key] / max(means[here.key], 1e-9),
        (here.phi - seen.bound) / unit,
        (option.phi - seen.bound) / unit,
        log1p(scale * seen.distance(here, option) / unit) / 3,
        log1p(move.pause / unit) / 3,
        log1p(move.seconds) / 3,
        log1p(move.bytes / 1e6) / 6,
        max(0.0, 1 - rest_s / COOLDOWN_S),
        log1p(max(0.0, rest_s) / 60) / 3,
        scale - 1,
        float(kind is Action.REDISTRIBUTE),
        float(kind is Action.RESPLIT),
        float(kind is Action.ROUTES),
        (len(option.chains) - len(here.chains)) / 2,
        min(seen.burn) / BURN_MAX if seen.burn is not None else 0.0,
    )
    clipped: Floats = np.clip(np.asarray(found), -LIMIT, LIMIT)
    return clipped


def imitation(inner: Sequence[float]) -> tuple[float, ...]:
    """Numbers with which the policy is about the smoothed threshold with a cooldown: a gain of 20 % fires, and of more
    the sooner after a move it is. `inner`, [HIDDEN * F], are W, which nothing heeds yet."""
    w = dict.fromkeys(FEATURES, 0.0) | {"smoothed gain": 1.0, "cooling": -1.0}
    return (*w.values(), -GAIN, *inner, *[0.0] * (2 * HIDDEN))


def read(path: Path = SHIPPED) -> Learned:
    """The policy of a file; raises `ResplitError(CORRUPT_FILE)` that names the file, what is wrong, and the remedy."""
    return Learned(read_parameters(path).values)


@cache
def shipped() -> Learned:
    """The policy that comes with Resplit; raises as `read` does."""
    return read()


def read_parameters(path: Path) -> Parameters:
    """All that a file says; raises as `read` does."""
    remedy = "train it anew: python -m simulator.learning --seed 0"
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        message = f"cannot read {path}, the parameters of the learned policy: {error.strerror}; {remedy}"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, "policies") from error
    try:
        return Parameters.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        message = f"{path} holds no parameters of the learned policy: {where}: {first['msg']}; {remedy}"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, "policies") from error


def _mean(state: TriggerState, option: Option) -> float:
    before = state.work.get(option.key, option.phi)
    return before + SMOOTHING * (option.phi - before)

"""PURE: the values of a decision to keep, redistribute or re-split, and the sentence a person would give for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from math import isfinite

from orchestrator.moving import MoveCost
from profiler.objective import Objective
from schemas.base import NodeId
from schemas.deployment import Chain, Placement, Stage
from schemas.errors import ErrorCode, ResplitError

OPTIONS_MAX = 16
"""Candidates that are weighed at once: the work function takes their square."""


class Action(StrEnum):
    """What is done about the current plan, the cheapest first."""

    KEEP = "keep"
    REDISTRIBUTE = "redistribute"
    """Stages change nodes; the cuts stay."""
    RESPLIT = "resplit"
    """Cuts move."""
    ROUTES = "routes"
    """A route is added, or given back."""
    HARD = "hard"
    """The current plan cannot stay, so nothing is weighed against leaving it."""


class Origin(StrEnum):
    """How a candidate came to be on the list."""

    CURRENT = "current"
    REASSIGNED = "reassigned"
    RESPLIT = "resplit"
    EDGE = "edge"
    """The best without the cloud."""
    AT_HAND = "at hand"
    """The best of blocks that lie on disks already: what another plan fetches takes longer than some need lasts."""
    ROUTE_ADDED = "route added"
    ROUTE_GIVEN_BACK = "route given back"
    FAILOVER = "failover"
    PREPARED = "being prepared"


@dataclass(frozen=True)
class Option:
    """One candidate plan, with what it is predicted to cost now."""

    chains: Placement
    origin: Origin
    objective: Objective
    terms: Mapping[str, float] = field(default_factory=dict)
    """`profiler.forecast.Forecast.terms`"""
    without: NodeId | None = None
    """The node that a failover plan does without."""
    missing: float = 0.0
    """The share of requests that is predicted to miss what the deployment promises; 0 where it promises nothing."""
    of_promised: float = 0.0
    """How many times what is promised they are predicted to take on average."""

    @cached_property
    def key(self) -> str:
        """What makes two candidates the same one: their placement."""
        return placement_text(self.chains)

    @property
    def phi(self) -> float:
        return self.objective.phi

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset(stage.node for chain in self.chains for stage in chain)

    def action_from(self, current: "Option") -> Action:
        """What going there from `current` would be called."""
        return action_between(current.chains, self.chains)


@dataclass(frozen=True)
class Observation:
    """What a policy decides on. Raises INVALID_REQUEST for a cost that is not a finite number, 0 or more."""

    epoch: int
    options: tuple[Option, ...]
    """The current plan first; at most `OPTIONS_MAX`."""
    moves: Mapping[tuple[str, str], MoveCost]
    """D for every ordered pair of different options."""
    bound: float
    """No plan whatsoever has a smaller Phi."""
    hard: str | None = None
    """Why the current plan cannot stay, if it cannot."""
    unfit: frozenset[NodeId] = frozenset()
    """Nodes that a plan chosen for that reason must do without."""
    pinned: bool = False
    """An operator placed the current plan: it never moves by itself."""
    model_bytes: int = 0
    """Weights of one copy of the model."""
    settling: bool = False
    """The plan before the current one still drains: it is left for need alone."""
    burn: tuple[float, float] | None = None
    """How fast the SLO's error budget burns, over a short and a long window; None while nobody measures it."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.options) <= OPTIONS_MAX:
            message = f"{len(self.options)} candidates; there is at least the current plan and at most {OPTIONS_MAX}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "options")
        keys = [option.key for option in self.options]
        if len(set(keys)) != len(keys):
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"a candidate stands twice among {keys}", "options")
        for option in self.options:
            _check(option.phi, f"Phi of {option.key}", "options")
        _check(self.bound, "the bound", "bound")
        for here in keys:
            for there in keys:
                if here != there:
                    if (here, there) not in self.moves:
                        message = f"there is no cost of moving from {here} to {there}"
                        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "moves")
                    _check(self.moves[here, there].total, f"the cost of moving from {here} to {there}", "moves")

    @property
    def current(self) -> Option:
        return self.options[0]

    def distance(self, here: Option, there: Option) -> float:
        """D, symmetrised: the same there and back, as the work function asks of a metric."""
        if here.key == there.key:
            return 0.0
        return (self.moves[here.key, there.key].total + self.moves[there.key, here.key].total) / 2


@dataclass(frozen=True)
class RunnerUp:
    """A candidate that was not chosen."""

    option: Option
    move: MoveCost | None
    """What going there would cost; None for the current plan."""
    why_not: str


@dataclass(frozen=True)
class Decision:
    """What was decided, and everything that it was decided on."""

    action: Action
    epoch: int
    """The epoch that was current."""
    at: datetime
    current: Option
    chosen: Option
    """The current plan again where it is kept."""
    move: MoveCost | None
    """What going there costs; None where nothing moves."""
    runners_up: tuple[RunnerUp, ...]
    """By Phi, ascending."""
    why_now: str
    bound: float
    certified: bool = False
    """Kept because no plan at all could repay a move, not only none of the candidates."""

    @property
    def acts(self) -> bool:
        return self.action is not Action.KEEP

    @property
    def sentence(self) -> str:
        """The reason as a person would give it."""
        if not self.acts:
            return f"Epoch {self.epoch} stays ({self.current.key}, {_speed(self.current)}): {self.why_now}."
        told = f"{_what(self)}: {self.why_now}. {_speed(self.current, past=True)} before, {_speed(self.chosen)} after"
        if self.move is not None:
            told += f"; the move takes about {self.move.seconds:.1f} s and {_size(self.move.bytes)}"
        if self.runners_up and self.runners_up[0].option.key != self.current.key:
            told += f". Next best: {self.runners_up[0].option.key}, {self.runners_up[0].why_not}"
        return f"{told}."


def placement_text(chains: Placement) -> str:
    """`n0:0-3 > n1:4 | n2:0-4`: what people read and candidates are compared by."""
    return " | ".join(chain_text(chain) for chain in chains)


def chain_text(chain: Chain) -> str:
    """One route as `n0:0-3 > n1:4`."""
    return " > ".join(f"{stage.node}:{_blocks(stage)}" for stage in chain)


def action_between(before: Placement, after: Placement) -> Action:
    """What going from one placement to the other is called."""
    if before == after:
        return Action.KEEP
    if len(before) != len(after):
        return Action.ROUTES
    return Action.REDISTRIBUTE if _cuts(before) == _cuts(after) else Action.RESPLIT


def _cuts(chains: Placement) -> list[list[int]]:
    return [[stage.last for stage in chain] for chain in chains]


def _what(decision: Decision) -> str:
    before, after = decision.current, decision.chosen
    match after.action_from(before):
        case Action.REDISTRIBUTE:
            swaps = [
                f"blocks {_blocks(new)} from {old.node} to {new.node}"
                for chain, changed in zip(before.chains, after.chains, strict=True)
                for old, new in zip(chain, changed, strict=True)
                if old.node != new.node
            ]
            return f"Move {', '.join(swaps)}, cuts unchanged"
        case Action.ROUTES:
            added = [chain for chain in after.chains if chain not in before.chains]
            gone = [chain for chain in before.chains if chain not in after.chains]
            told = [f"{word} {placement_text(tuple(some))}" for word, some in (("add", added), ("end", gone)) if some]
            return f"Go from {_count(before)} to {_count(after)}: {', '.join(told)}"
        case _:
            return f"Re-split from {before.key} to {after.key}"


def _count(option: Option) -> str:
    return f"{len(option.chains)} route{'s' if len(option.chains) > 1 else ''}"


def _blocks(stage: Stage) -> str:
    return f"{stage.first}-{stage.last}" if stage.last > stage.first else str(stage.first)


def _speed(option: Option, past: bool = False) -> str:
    tpot = option.terms.get("tpot_ms")
    if tpot is None:
        return f"Phi {option.phi:.2f}"
    return f"{'A' if past else 'a'} token {'took' if past else 'takes'} {tpot:.1f} ms (Phi {option.phi:.2f})"


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit} over the network"
    return "nothing over the network" if not count else f"{count:.0f} bytes over the network"


def _check(value: float, what: str, field_name: str) -> None:
    if not isfinite(value) or value < 0:
        message = f"{what} is {value}; it must be a finite number, 0 or more"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, field_name)

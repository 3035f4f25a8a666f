"""Who decides: the full system, and what it is compared with, each under a name (mathematics.md, part D).

A contender differs from the full system in who places its blocks, in the trigger's policy, or in the parts that it does
without; everything else is the same code over the same world.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Flag, auto
from functools import partial
from typing import Literal

from orchestrator.decision import Action, Decision, Observation
from orchestrator.moving import MoveCost
from orchestrator.trigger import (
    DEFAULT_POLICY,
    AlwaysArgmin,
    EwmaThreshold,
    Policy,
    RoundTripRegret,
    TriggerState,
    WorkFunction,
)
from schemas.errors import ErrorCode, ResplitError
from simulator.foresight import Foresight, Step
from simulator.learned import shipped

Rule = Literal["even", "greedy", "random", "round-robin", "edgeshard", "source", "cloud"]


class Never:
    """Moves for a hard trigger alone: a node that is lost."""

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        # Nothing is better by its whole cost; and what burns an error budget is no node that is lost.
        return EwmaThreshold(gain=1.0)(state, replace(observation, burn=None), now)


@dataclass(frozen=True)
class Periodic:
    """Plans anew every so often and goes wherever that leads."""

    period: timedelta = timedelta(seconds=60)

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        since = state.moved_at
        if since is not None and now - since < self.period:
            return Never()(state, observation, now)
        after, decision = AlwaysArgmin()(state, observation, now)
        return replace(after, moved_at=now), decision


@dataclass(frozen=True)
class Filtered:
    """The full system's rule over some of its candidates, or with other prices."""

    keeps: Callable[[Observation, int], bool] = lambda seen, number: True
    prices: Callable[[MoveCost], MoveCost] = lambda cost: cost

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        options = tuple(
            one
            for number, one in enumerate(observation.options)
            if number == 0 or observation.hard is not None or self.keeps(observation, number)
        )
        moves = {pair: self.prices(cost) for pair, cost in observation.moves.items()}
        return DEFAULT_POLICY(state, replace(observation, options=options, moves=moves), now)


def _shipped_rule() -> Policy:
    return DEFAULT_POLICY


def _moves_nodes_alone(seen: Observation, number: int) -> bool:
    return seen.options[number].action_from(seen.current) is Action.REDISTRIBUTE


def _free(cost: MoveCost) -> MoveCost:
    return replace(cost, price=0.0, slowdown=0.0, pause=0.0, fixed=0.0)


@dataclass(frozen=True)
class Planned:
    """Placed by the planner, as in production. What is planned `once` is locked from then on."""

    once: bool = False


@dataclass(frozen=True)
class ByRule:
    """Placed once, by a rule, as soon as all nodes have reported."""

    rule: Rule


@dataclass(frozen=True)
class Foreseen:
    """Told its placements beforehand by whoever knows the run (`simulator.foresight`). Where it is told none, the
    planner's."""

    steps: Callable[[Foresight], tuple[Step, ...]]


@dataclass(frozen=True)
class Swarming:
    """Placed, and placed anew, by Petals' rule (`simulator.petals`)."""


Placing = Planned | ByRule | Foreseen | Swarming


class Part(Flag):
    """Parts of the full system that a contender may do without."""

    STAGING = auto()
    """Blocks that may be needed are fetched ahead of need."""
    OVERLAP = auto()
    """What is in force serves while another plan is prepared (make before break)."""
    HANDOVER = auto()
    """Sequences that move take their caches along; without it they are computed anew."""
    RECOVERY = auto()
    """Another plan is made when a node is lost; without it, it is waited for."""


WHOLE = Part.STAGING | Part.OVERLAP | Part.HANDOVER | Part.RECOVERY


@dataclass(frozen=True)
class Contender:
    """One way to decide: where blocks run first, who says when they move, and what there is to help."""

    name: str
    title: str
    policy: Callable[[], Policy] = _shipped_rule
    """Makes the trigger's policy; raises what reading it from a file raises."""
    placing: Placing = Planned()
    parts: Part = WHOLE
    is_bound: bool = False
    """It knows what no system knows: nobody is expected to do better."""


def _mean_optimum(known: Foresight) -> tuple[Step, ...]:
    return () if known.static is None else (Step(0.0, 0.0, known.static),)


def _cheapest_way(known: Foresight) -> tuple[Step, ...]:
    return known.schedule


def _placed_once(name: str, title: str, placing: Placing) -> Contender:
    """One that never moves, whatever is lost."""
    return Contender(name, title, Never, placing, WHOLE & ~Part.RECOVERY)


CONTENDERS: Mapping[str, Contender] = {
    one.name: one
    for one in (
        Contender("full", "the full system"),
        _placed_once("static", "static optimum on the mean state, waits for what is lost", Foreseen(_mean_optimum)),
        Contender(
            "static-restart",
            "static optimum on the mean state, and another plan when a node is lost",
            Never,
            Foreseen(_mean_optimum),
        ),
        _placed_once("static-start", "the optimum at the beginning, waits for what is lost", Planned(once=True)),
        Contender(
            "clairvoyant", "knows the run, and pays for its moves", Never, Foreseen(_cheapest_way), is_bound=True
        ),
        _placed_once("even", "even split over the fastest nodes", ByRule("even")),
        _placed_once("random", "random split", ByRule("random")),
        _placed_once("round-robin", "nodes as they stand", ByRule("round-robin")),
        _placed_once("greedy", "fastest node first", ByRule("greedy")),
        _placed_once("edgeshard", "EdgeShard's dynamic programme, once", ByRule("edgeshard")),
        _placed_once("source-only", "one node of the first site alone", ByRule("source")),
        _placed_once("cloud-only", "the cloud alone", ByRule("cloud")),
        Contender("periodic", "plans anew every minute", Periodic),
        Contender("always-argmin", "goes wherever it looks better", AlwaysArgmin),
        Contender("threshold", "smoothed threshold and a cooldown", EwmaThreshold),
        Contender("regret", "round-trip regret", RoundTripRegret),
        Contender("petals", "Petals' rule: every server where blocks are worst served", Never, Swarming()),
        Contender("learned", "a small network, trained in the simulator", shipped),
        Contender("redistribute-only", "moves blocks, never cuts", partial(Filtered, keeps=_moves_nodes_alone)),
        Contender("no-hysteresis", "the full system without its margin", partial(WorkFunction, margin=0.0)),
        Contender("no-move-cost", "the full system, to which moves are free", partial(Filtered, prices=_free)),
        Contender("no-staging", "the full system without blocks fetched ahead", parts=WHOLE & ~Part.STAGING),
        Contender("no-make-before-break", "the full system that serves nothing meanwhile", parts=WHOLE & ~Part.OVERLAP),
        Contender("no-handover", "the full system that computes anew what it moves", parts=WHOLE & ~Part.HANDOVER),
    )
}


def named(name: str) -> Contender:
    """The contender of that name; raises INVALID_REQUEST with those there are."""
    if name not in CONTENDERS:
        message = f"there is no policy {name!r}; the policies are: {', '.join(CONTENDERS)}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "policies")
    return CONTENDERS[name]

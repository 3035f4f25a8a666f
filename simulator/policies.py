"""Who decides: the full system, and what it is compared with, each under a name (mathematics.md, part D).

A contender differs from the full system in what it wants of the deployment, in the trigger's policy, or in what it does
about the sequences that run; everything else is the same code over the same world.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from orchestrator.chain import problem_of
from orchestrator.decision import Action, Decision, Observation
from orchestrator.fold import Snapshot
from orchestrator.moving import MoveCost
from orchestrator.rooms import believed_rooms
from orchestrator.solvers import baselines
from orchestrator.solvers.problem import Problem, Solution
from orchestrator.trigger import AlwaysArgmin, EwmaThreshold, Policy, RoundTripRegret, TriggerState, WorkFunction
from schemas.base import NodeId
from schemas.deployment import Chain, Deployment, Stage
from schemas.errors import ErrorCode, ResplitError
from simulator.foresight import Foresight, Step
from simulator.learned import shipped

Foresees = Callable[[Foresight], tuple[Step, ...]]
Static = Literal["optimum", "even", "greedy", "random", "round-robin", "edgeshard", "source", "cloud"]


DEFAULT_RULE: Policy = WorkFunction()


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
    rule: Policy = DEFAULT_RULE

    def __call__(self, state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
        options = tuple(
            one
            for number, one in enumerate(observation.options)
            if number == 0 or observation.hard is not None or self.keeps(observation, number)
        )
        moves = {pair: self.prices(cost) for pair, cost in observation.moves.items()}
        return self.rule(state, replace(observation, options=options, moves=moves), now)


def _moves_nodes_alone(seen: Observation, number: int) -> bool:
    return seen.options[number].action_from(seen.current) is Action.REDISTRIBUTE


def _free(cost: MoveCost) -> MoveCost:
    return replace(cost, price=0.0, slowdown=0.0, pause=0.0, fixed=0.0)


@dataclass(frozen=True)
class Contender:
    """One way to decide. A `static` one is placed once, by a rule, and stays. One that `foresees` is told placements
    beforehand by whoever knows the run (`simulator.foresight`)."""

    name: str
    title: str
    policy: Policy = DEFAULT_RULE
    static: Static | None = None
    foresees: Foresees | None = None
    stages_ahead: bool = True
    hands_over: bool = True
    recovers: bool = True
    """Whether another plan is made when a node is lost; a static one waits for it."""
    swarms: bool = False
    """Placed, and placed anew, by Petals' rule (`simulator.petals`)."""
    makes_before_breaks: bool = True
    """Whether what is in force serves while another plan is prepared."""
    is_learned: bool = False
    """Decides as `simulator.learned` has it from its file."""
    bound: bool = False
    """It knows what no system knows: nobody is expected to do better."""

    def decides(self) -> Policy:
        """Its policy; raises what `simulator.learned.shipped` raises where there is no such file."""
        return shipped() if self.is_learned else self.policy


def _mean_optimum(known: Foresight) -> tuple[Step, ...]:
    return () if known.static is None else (Step(0.0, 0.0, known.static),)


def _cheapest_way(known: Foresight) -> tuple[Step, ...]:
    return known.schedule


CONTENDERS: Mapping[str, Contender] = {
    one.name: one
    for one in (
        Contender("full", "the full system"),
        Contender(
            "static",
            "static optimum on the mean state, waits for what is lost",
            Never(),
            None,
            _mean_optimum,
            recovers=False,
        ),
        Contender(
            "static-restart",
            "static optimum on the mean state, and another plan when a node is lost",
            Never(),
            None,
            _mean_optimum,
        ),
        Contender(
            "static-start", "the optimum at the beginning, waits for what is lost", Never(), "optimum", recovers=False
        ),
        Contender("clairvoyant", "knows the run, and pays for its moves", Never(), None, _cheapest_way, bound=True),
        Contender("even", "even split over the fastest nodes", Never(), "even", recovers=False),
        Contender("random", "random split", Never(), "random", recovers=False),
        Contender("round-robin", "nodes as they stand", Never(), "round-robin", recovers=False),
        Contender("greedy", "fastest node first", Never(), "greedy", recovers=False),
        Contender("edgeshard", "EdgeShard's dynamic programme, once", Never(), "edgeshard", recovers=False),
        Contender("source-only", "one node of the first site alone", Never(), "source", recovers=False),
        Contender("cloud-only", "the cloud alone", Never(), "cloud", recovers=False),
        Contender("periodic", "plans anew every minute", Periodic()),
        Contender("always-argmin", "goes wherever it looks better", AlwaysArgmin()),
        Contender("threshold", "smoothed threshold and a cooldown", EwmaThreshold()),
        Contender("regret", "round-trip regret", RoundTripRegret()),
        Contender("petals", "Petals' rule: every server where blocks are worst served", Never(), swarms=True),
        Contender("learned", "a small network, trained in the simulator", is_learned=True),
        Contender("redistribute-only", "moves blocks, never cuts", Filtered(keeps=_moves_nodes_alone)),
        Contender("no-hysteresis", "the full system without its margin", WorkFunction(margin=0.0)),
        Contender("no-move-cost", "the full system, to which moves are free", Filtered(prices=_free)),
        Contender("no-staging", "the full system without blocks fetched ahead", stages_ahead=False),
        Contender("no-make-before-break", "the full system that serves nothing meanwhile", makes_before_breaks=False),
        Contender("no-handover", "the full system that computes anew what it moves", hands_over=False),
    )
}


def named(name: str) -> Contender:
    """The contender of that name; raises INVALID_REQUEST with those there are."""
    if name not in CONTENDERS:
        message = f"there is no policy {name!r}; the policies are: {', '.join(CONTENDERS)}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "policies")
    return CONTENDERS[name]


def placed(static: Static, snapshot: Snapshot, deployment: Deployment, seed: int) -> Chain | None:
    """The one chain of a static contender over the nodes that have reported, or None where its rule finds none."""
    manifest = snapshot.manifests[deployment.model]
    rooms = believed_rooms(snapshot, deployment, manifest)
    if static == "cloud":
        rooms = {node: room for node, room in rooms.items() if room.capacity.tier == "cloud"}
    if static == "source":
        rooms = dict(list(rooms.items())[:1])
    if not rooms:
        return None
    problem = problem_of(deployment, manifest, rooms)
    rules: dict[Static, Callable[[Problem], Solution]] = {
        "even": baselines.even,
        "greedy": baselines.greedy,
        "random": lambda asked: baselines.random(asked, seed),
        "round-robin": baselines.round_robin,
        "edgeshard": baselines.edgeshard,
        "source": baselines.greedy,
        "cloud": baselines.greedy,
    }
    found = rules[static](problem)
    if found.pieces is None:
        return None
    nodes = [NodeId(node) for node in rooms]
    return tuple(Stage(node=nodes[piece.node], first=piece.first, last=piece.last) for piece in found.pieces)

"""Where a contender's blocks run first, and who says so if not the planner: a rule, a swarm, or foresight."""

from collections.abc import Callable, Collection, Sequence

from orchestrator.chain import problem_of
from orchestrator.fold import Snapshot
from orchestrator.rooms import believed_rooms
from orchestrator.solvers import baselines
from orchestrator.solvers.problem import Problem, Solution
from schemas.base import NodeId
from schemas.deployment import Chain, Deployment, Placement, Stage, blocks_by_node
from simulator import petals
from simulator.draws import Draws
from simulator.foresight import Step
from simulator.kernel import Kernel
from simulator.operators import Operators
from simulator.policies import ByRule, Contender, Foreseen, Part, Planned, Rule, Swarming

PLACED_AT_S = 2.0
"""A contender that is placed by a rule is once every node has reported."""
LOOK_EVERY_S = 0.5
"""Whether servers of a swarm came or went."""
INSISTED_S = 30.0
"""A placement that was known beforehand to be best and is not in force by then is given up, where another may be made:
something has happened that nobody could know."""


class Placer:
    """Has operators lock a contender's placements."""

    def __init__(
        self,
        contender: Contender,
        seed: int,
        steps: Sequence[Step],
        kernel: Kernel,
        operators: Operators,
        known: Callable[[], Snapshot | None],
        foresee: Callable[[NodeId, Collection[int]], None],
    ) -> None:
        """The first of `steps` is locked from the beginning; `known` is the leader's snapshot."""
        self._contender = contender
        self._seed = seed
        self._steps = tuple(steps)
        self._kernel = kernel
        self._operators = operators
        self._known = known
        self._foresee = foresee
        self._recovers = Part.RECOVERY in contender.parts
        self._insisted: Placement | None = None
        """A placement that is locked until it is in force, or for good."""
        self._swarm = petals.Swarm()
        self._looks, self._look_at_s = 0, 0.0
        self._locked = False
        if steps:
            self._insisted = steps[0].placement
            operators.lock(steps[0].placement)
        elif isinstance(contender.placing, Planned | Foreseen):
            operators.release()

    def open(self) -> None:
        """Somebody leads."""
        match self._contender.placing:
            case Swarming():
                self._kernel.every(LOOK_EVERY_S, self._look, PLACED_AT_S)
            case ByRule(rule):
                self._kernel.at(PLACED_AT_S, self._place, rule)
            case Planned() | Foreseen():
                pass
        if Part.STAGING in self._contender.parts and len(self._steps) > 1:
            self._kernel.at(PLACED_AT_S, self._stage)
        for step in self._steps:
            self._kernel.at(step.begin_s, self._insist, step.placement)

    def lock(self, placement: Chain | Placement) -> None:
        """An operator wants it run like this, whatever was insisted on."""
        self._insisted = None
        self._operators.lock(placement)

    def in_force(self, placement: Placement) -> None:
        """A plan for this has been committed."""
        if self._contender.placing == Planned(once=True) and not self._locked:
            self._locked = True
            self._kernel.after(0.0, self.lock, placement)
        if self._recovers and placement == self._insisted:
            self._kernel.after(0.0, self._release, placement)

    def _place(self, rule: Rule) -> None:
        """Lock what the rule says, as an operator would; where it finds nothing, nothing is served."""
        known = self._known()
        if known is None:
            return
        chain = placed(rule, known, self._operators.wanted, self._seed)
        if chain is not None:
            self.lock(chain)

    def _look(self) -> None:
        """Have the swarm look where it should be, now and then and as soon as its servers are others, and lock what it
        comes to, if that is something new."""
        known, now = self._known(), self._kernel.now
        if known is None or (now < self._look_at_s and known.offered.keys() == self._swarm.runs.keys()):
            return
        self._look_at_s = now + petals.PERIOD_S
        before, self._looks = self._swarm, self._looks + 1
        rng = Draws(self._seed).stream(f"petals {self._looks}")
        self._swarm = petals.balanced(known, self._operators.wanted, before, rng)
        if self._swarm.placement != before.placement:
            self.lock(self._swarm.placement)

    def _insist(self, placement: Placement) -> None:
        """Lock what was known beforehand to be best; where lost nodes are replaced, until it is in force."""
        self._operators.lock(placement)
        self._insisted = placement
        if self._recovers:
            self._kernel.after(INSISTED_S, self._release, placement)

    def _release(self, placement: Placement) -> None:
        """From now on another may be made, should this one be lost."""
        if self._insisted == placement:
            self._insisted = None
            self._operators.release()

    def _stage(self) -> None:
        """What is known to be needed later is fetched ahead of need."""
        chains = tuple(chain for step in self._steps for chain in step.placement)
        for node, needed in blocks_by_node(chains).items():
            self._foresee(node, needed)


def placed(rule: Rule, snapshot: Snapshot, deployment: Deployment, seed: int) -> Chain | None:
    """The one chain of a rule over the nodes that have reported, or None where it finds none."""
    manifest = snapshot.manifests[deployment.model]
    rooms = believed_rooms(snapshot, deployment, manifest)
    if rule == "cloud":
        rooms = {node: room for node, room in rooms.items() if room.capacity.tier == "cloud"}
    if rule == "source":
        rooms = dict(list(rooms.items())[:1])
    if not rooms:
        return None
    problem = problem_of(deployment, manifest, rooms)
    rules: dict[Rule, Callable[[Problem], Solution]] = {
        "even": baselines.even,
        "greedy": baselines.greedy,
        "random": lambda asked: baselines.random(asked, seed),
        "round-robin": baselines.round_robin,
        "edgeshard": baselines.edgeshard,
        "source": baselines.greedy,
        "cloud": baselines.greedy,
    }
    found = rules[rule](problem)
    if found.pieces is None:
        return None
    nodes = [NodeId(node) for node in rooms]
    return tuple(Stage(node=nodes[piece.node], first=piece.first, last=piece.last) for piece in found.pieces)

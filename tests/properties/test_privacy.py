"""I6 of mathematics.md A5: no sensitive block is ever planned for a node that is not trusted, PREPARE included.

Random clusters of edge and cloud, wishes and words of trust that change, nodes that are slowed, lost and come back,
demand that comes and goes: whatever is proposed, prepared, ready for a failure or in force is looked at.
"""

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.decide import Replan, decide
from orchestrator.fold import DeploymentWritten, NodeWished, Weighed, fold
from orchestrator.proposing import propose
from orchestrator.trigger import PLANNING_PERIOD_S
from orchestrator.weighing import chosen_plan, weigh, weighable
from schemas.base import NodeId
from schemas.deployment import Deployment, NodeWish, Placement, Sensitive
from schemas.errors import ResplitError
from tests.trigger_world import BLOCKS, CHAT, MODEL, SETTINGS, World

SENSITIVE: tuple[Sensitive | None, ...] = (None, "ends", "all", (0,), (BLOCKS - 1,), (2, 5))


class Privacy(RuleBasedStateMachine):
    """An orchestrator's decisions, step by step, on a cluster that changes under it."""

    world: World | None = None

    @initialize(
        nodes=st.integers(2, 5),
        cloud=st.sets(st.integers(0, 4)),
        room=st.floats(2.5, 9),
        routes=st.none() | st.integers(1, 3),
        sensitive=st.sampled_from(SENSITIVE),
    )
    def begin(self, nodes: int, cloud: set[int], room: float, routes: int | None, sensitive: Sensitive | None) -> None:
        prices = {NodeId(f"n{i}"): 0.5 for i in cloud if i < nodes}
        wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, routes=routes, sensitive=sensitive)
        self.prepared: list[Placement] = []
        try:
            self.world = World(nodes, 0, noise=0.1, room=room, prices=prices, wish=wish)
        except ResplitError:
            self.world = None  # nothing fits there from the start

    @rule(node=st.integers(0, 4), trusted=st.sampled_from([True, False, None]), drained=st.booleans())
    def say(self, node: int, trusted: bool | None, drained: bool) -> None:
        if self.world is not None:
            name = self.world.names[node % len(self.world.names)]
            wish = NodeWish(node=name, trusted=trusted, drained=drained and node == 0)
            self.world.snapshot = fold(self.world.snapshot, NodeWished(wish), self.world.now)

    @rule(routes=st.none() | st.integers(1, 3), sensitive=st.sampled_from(SENSITIVE))
    def deploy(self, routes: int | None, sensitive: Sensitive | None) -> None:
        if self.world is not None:
            wish = self.world.wish.model_copy(update={"routes": routes, "sensitive": sensitive})
            self.world.wish = wish
            self.world.snapshot = fold(self.world.snapshot, DeploymentWritten(wish), self.world.now)

    @rule(node=st.integers(0, 4), factor=st.sampled_from([1.0, 3.0]), sequences=st.sampled_from([0, 4, 32]))
    def disturb(self, node: int, factor: float, sequences: int) -> None:
        if self.world is not None:
            self.world.slow = {self.world.names[node % len(self.world.names)]: factor}
            self.world.sequences = sequences

    @rule(lost=st.sets(st.integers(0, 4), max_size=2))
    def lose(self, lost: set[int]) -> None:
        if self.world is not None:
            names = frozenset(self.world.names[i] for i in lost if i < len(self.world.names))
            self.world.snapshot = replace(self.world.snapshot, absent=names)

    @rule(looks=st.integers(1, 6))
    def go_on(self, looks: int) -> None:
        """Heartbeats of those that are here, then what the orchestrator does once it has heard them."""
        for _ in range(looks if self.world is not None else 0):
            assert self.world is not None
            absent = self.world.snapshot.absent
            self.world.now += timedelta(seconds=PLANNING_PERIOD_S)
            self.world.hear()
            self.world.snapshot = replace(self.world.snapshot, absent=absent)
            self.settle(self.world)

    def settle(self, world: World) -> None:
        for decision in decide(world.snapshot, world.now):
            if isinstance(decision, Replan):
                try:
                    plan = propose(world.snapshot, world.wish, decision.need, world.now).plan
                except ResplitError:
                    continue  # nothing fits: what serves, if anything, is said to be degraded
                self.prepare(world, plan.chains)
                world.adopt(plan)
        if CHAT not in weighable(world.snapshot, world.now):
            return
        outlook = weigh(world.snapshot, CHAT, world.policy, world.now)
        world.snapshot = fold(world.snapshot, Weighed(outlook), world.now)
        for chains in (*outlook.failovers.values(), *(r.option.chains for r in outlook.decision.runners_up)):
            if chains != world.plan.chains:
                self.prepare(world, chains)
        if outlook.decision.acts:
            plan = chosen_plan(world.snapshot, outlook).plan
            self.prepare(world, plan.chains)
            world.adopt(plan)

    def prepare(self, world: World, chains: Placement) -> None:
        assert exposed(world, chains) == []

    @invariant()
    def what_is_in_force_exposes_nothing_unless_it_is_left_at_once(self) -> None:
        if self.world is None or not exposed(self.world, self.world.plan.chains):
            return
        [decision] = decide(replace(self.world.snapshot, absent=frozenset()), self.world.now)
        assert isinstance(decision, Replan)
        assert decision.need.hard


def exposed(world: World, chains: Placement) -> list[str]:
    """Nodes that hold what they must not see, judged by the wishes alone."""
    secret = world.wish.sensitive_of(BLOCKS)
    words = world.snapshot.trust
    return [
        stage.node
        for chain in chains
        for stage in chain
        if secret & set(stage.blocks) and not words.get(stage.node, stage.node not in world.prices)
    ]


TestPrivacy = Privacy.TestCase
TestPrivacy.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestPrivacyAtLength(TestPrivacy):  # type: ignore[misc, valid-type]
    """The same with more stories."""

    settings = settings(max_examples=80, stateful_step_count=20, deadline=None)

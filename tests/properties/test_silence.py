"""A node is lost when its time is over, however seldom all of them are looked at."""

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fold import LOST_IN_PLAN, LOST_SPARE, CapacityReceived, RolloutAdvanced, Tick, fold
from schemas.base import NodeId
from schemas.deployment import Stage
from tests.unit.test_orchestrator_planning import CHAT, START, A, B, C, heartbeat, planned, wish, world

TICK_S = 0.5
NODES = (A, B, C)
Step = tuple[int, frozenset[NodeId], NodeId | None]
"""Ticks that pass, who then reports, and the node of the plan that is then in force, if another one is."""

steps = st.lists(
    st.tuples(st.integers(1, 12), st.frozensets(st.sampled_from(NODES)), st.one_of(st.none(), st.sampled_from(NODES))),
    max_size=25,
)


@given(steps)
def test_a_silent_node_is_lost_when_its_time_is_over_and_not_before(history: list[Step]) -> None:
    snapshot = world(*(heartbeat(node) for node in NODES))
    plan = planned(snapshot, wish())
    heard: dict[NodeId, datetime] = dict.fromkeys(NODES, START)
    watched: dict[NodeId, datetime] = {}
    lost: set[NodeId] = set()
    now, said = START, 0

    def due(node: NodeId) -> datetime:
        return max(watched[node], heard[node]) + LOST_IN_PLAN if node in watched else heard[node] + LOST_SPARE

    for ticks, reports, user in history:
        for _ in range(ticks):
            now += timedelta(seconds=TICK_S)
            snapshot = fold(snapshot, Tick(), now)
            lost |= {node for node in NODES if now >= due(node)}
            assert snapshot.absent == lost
        for node in sorted(reports):
            said += 1
            snapshot = fold(snapshot, CapacityReceived(heartbeat(node, sequence=said)), now)
            heard[node] = now
            lost.discard(node)
        if user is not None:
            route = plan.routes[0].model_copy(update={"source": user, "stages": (Stage(node=user, first=0, last=3),)})
            used = replace(snapshot.rollout(CHAT), current=plan.model_copy(update={"routes": (route,)}))
            snapshot = fold(snapshot, RolloutAdvanced(used), now)
            watched = {user: watched.get(user, now)}

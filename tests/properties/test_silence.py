"""A node is lost when its time is over, however seldom all of them are looked at."""

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.fold import LOST_IN_PLAN, LOST_SPARE, TAKEN_UP, CapacityReceived, RolloutAdvanced, Tick, fold
from schemas.base import NodeId
from schemas.capacity import HostedStage
from schemas.deployment import Stage
from tests.unit.test_orchestrator_planning import CHAT, MODEL, START, A, B, C, heartbeat, planned, wish, world

TICK_S = 0.5
NODES = (A, B, C)
RUNS = HostedStage(deployment=CHAT, epoch=1, model=MODEL, blocks=(0,), state="serving", sequences=0)
Step = tuple[int, dict[NodeId, bool], NodeId | None]
"""Ticks that pass, who then reports and whether it runs something, and the node of the plan that is then in force, if
another one is."""

steps = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.dictionaries(st.sampled_from(NODES), st.booleans()),
        st.one_of(st.none(), st.sampled_from(NODES)),
    ),
    max_size=25,
)


@given(steps)
def test_a_silent_node_is_lost_when_its_time_is_over_and_not_before(history: list[Step]) -> None:
    snapshot = world(*(heartbeat(node) for node in NODES))
    plan = planned(snapshot, wish())
    heard: dict[NodeId, datetime] = dict.fromkeys(NODES, START)
    watched: dict[NodeId, datetime] = {}
    runs: dict[NodeId, bool] = dict.fromkeys(NODES, False)
    lost: set[NodeId] = set()
    now, said = START, 0

    def due(node: NodeId) -> datetime:
        refused = node in watched and not runs[node] and heard[node] - watched[node] > TAKEN_UP
        if node not in watched or refused:
            return heard[node] + LOST_SPARE
        return max(watched[node], heard[node]) + LOST_IN_PLAN

    for ticks, reports, user in history:
        for _ in range(ticks):
            now += timedelta(seconds=TICK_S)
            snapshot = fold(snapshot, Tick(), now)
            lost |= {node for node in NODES if now >= due(node)}
            assert snapshot.absent == lost
        for node, runs_something in sorted(reports.items()):
            said += 1
            update = {"stages": (RUNS,) if runs_something else ()}
            capacity = heartbeat(node, sequence=said).model_copy(update=update)
            snapshot = fold(snapshot, CapacityReceived(capacity), now)
            heard[node], runs[node] = now, runs_something
            lost.discard(node)
        if user is not None:
            route = plan.routes[0].model_copy(update={"source": user, "stages": (Stage(node=user, first=0, last=3),)})
            used = replace(snapshot.rollout(CHAT), current=plan.model_copy(update={"routes": (route,)}))
            snapshot = fold(snapshot, RolloutAdvanced(used), now)
            watched = {user: watched.get(user, now)}

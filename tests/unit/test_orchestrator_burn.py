"""From counters in heartbeats to a burn rate, and from there into a decision."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from orchestrator.burn import LONG, MISSES_MIN, REQUESTS_MIN, SETTLING, Record, attainment, heard
from orchestrator.decide import Cause, what_is_needed
from orchestrator.decision import Action, Decision, Observation
from orchestrator.fold import CapacityReceived, DeploymentRemoved, DeploymentWritten, fold
from orchestrator.proposing import propose
from orchestrator.trigger import DEFAULT_POLICY, TriggerState
from orchestrator.view import status
from orchestrator.weighing import weigh
from schemas.base import DeploymentName, NodeId
from schemas.capacity import Capacity, Service
from schemas.deployment import Deployment
from schemas.slo import Slo
from tests.trigger_world import CHAT, MODEL, SETTINGS, START, World

N0 = NodeId("n0")
SECOND = timedelta(seconds=1)
CAPACITY = World(2, 0, noise=0.0).heartbeat(N0)


def beat(met: int, missed: int, boot: str = "a") -> Capacity:
    service = (Service(deployment=CHAT, met=met, missed=missed),)
    return CAPACITY.model_copy(update={"boot": boot, "service": service})


def record(*beats: Capacity) -> Record:
    """What a second apart each told."""
    records: dict[DeploymentName, Record] = {}
    before: Capacity | None = None
    for i, capacity in enumerate(beats):
        records = dict(heard(records, before, capacity, START + i * SECOND))
        before = capacity
    return records.get(CHAT, ())


def totals(found: Record) -> tuple[int, int]:
    return sum(count.met for count in found), sum(count.missed for count in found)


def test_only_what_came_since_the_last_heartbeat_counts() -> None:
    assert record(beat(1000, 500)) == (), "nobody knows when those were"
    assert totals(record(beat(1000, 500), beat(1007, 501), beat(1007, 501))) == (7, 1)


def test_a_process_that_is_new_counts_from_nothing() -> None:
    assert totals(record(beat(1000, 500), beat(3, 2, boot="b"))) == (3, 2)


def test_a_record_forgets_what_is_older_than_the_long_window_and_stays_short() -> None:
    beats = [beat(i, 0) for i in range(1200)]
    found = record(*beats)
    assert len(found) <= 70
    assert found[-1].at - found[0].at <= LONG


def test_the_budget_burns_by_the_share_that_missed_in_each_window() -> None:
    calm = record(beat(0, 0), beat(80, 0))
    now = START + timedelta(seconds=100)
    later = heard({CHAT: calm}, beat(80, 0), beat(90, 10), now)[CHAT]
    seen = attainment(later, None, now)
    assert seen is not None
    assert (seen.met, seen.missed) == (90, 10)
    assert seen.burn is not None
    assert list(seen.burn) == pytest.approx([50, 10])


def test_few_requests_and_few_misses_are_no_trend() -> None:
    few = attainment(record(beat(0, 0), beat(0, REQUESTS_MIN - 1)), None, START + SECOND)
    assert few is not None
    assert few.burn is None
    rare = attainment(record(beat(0, 0), beat(REQUESTS_MIN, MISSES_MIN - 1)), None, START + SECOND)
    assert rare is not None
    assert rare.burn == (0.0, 0.0)
    assert attainment((), None, START) is None


def test_what_an_earlier_plan_missed_says_nothing_about_this_one() -> None:
    found = record(beat(0, 0), beat(50, 50))
    assert attainment(found, START, START + SECOND) is None
    late = record(*[beat(0, 0)] * (int(SETTLING.total_seconds()) + 2), beat(50, 50))
    assert attainment(late, START, START + 2 * SETTLING) is not None


def burning(world: World) -> None:
    """A minute in which a tenth of the requests missed their class."""
    for second in range(60):
        world.run(1)
        counters = (Service(deployment=CHAT, met=9 * second, missed=second),)
        world.heard += 1
        capacity = world.heartbeat(N0).model_copy(update={"service": counters})
        world.snapshot = fold(world.snapshot, CapacityReceived(capacity), world.now)


def promising() -> World:
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, slo=Slo(ttft_ms=100))
    return World(4, 0, noise=0.0, wish=wish)


def test_status_says_how_requests_fared() -> None:
    world = promising()
    assert status(world.snapshot, world.now).deployments[0].attainment is None
    burning(world)
    [seen] = status(world.snapshot, world.now).deployments
    assert seen.attainment is not None
    assert seen.attainment.met == pytest.approx(9 * seen.attainment.missed, rel=0.1)
    gone = fold(world.snapshot, DeploymentRemoved(CHAT), world.now)
    assert CHAT not in gone.burns


def test_a_budget_that_burns_moves_nothing_while_no_plan_is_better_beyond_what_measurements_vary_by() -> None:
    world = promising()
    burning(world)
    decision = weigh(world.snapshot, CHAT, DEFAULT_POLICY, world.now).decision
    assert decision.action is Action.KEEP
    assert "error budget" in decision.why_now


def test_a_budget_that_burns_moves_the_deployment_at_once_where_a_better_plan_is_there() -> None:
    world = promising()
    world.policy = keep
    world.slow = {NodeId(world.plan.routes[0].stages[0].node): 3.0}
    burning(world)
    decision = weigh(world.snapshot, CHAT, DEFAULT_POLICY, world.now).decision
    assert decision.action is Action.HARD
    assert "error budget" in decision.why_now
    calm = replace(world.snapshot, burns={})
    assert weigh(calm, CHAT, DEFAULT_POLICY, world.now).decision.action is not Action.HARD


def keep(state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
    """A policy that never moves."""
    return DEFAULT_POLICY(state, replace(observation, pinned=True, burn=None), now)


def test_another_class_gets_the_same_routes_though_a_better_plan_is_there_and_sequences_can_cross() -> None:
    world = World(4, 0, noise=0.0)
    before = world.plan
    world.policy = keep
    world.slow = {NodeId(before.routes[0].stages[0].node): 3.0}
    world.run(30)
    wish = world.wish.model_copy(update={"slo": Slo(tpot_ms=50)})
    snapshot = fold(world.snapshot, DeploymentWritten(wish), world.now)
    need = what_is_needed(snapshot, wish, snapshot.rollout(CHAT))
    assert need is not None
    assert need.cause is Cause.WISH_CHANGED
    found = propose(snapshot, wish, need, world.now).plan
    assert (found.routes, found.slo, found.family) == (before.routes, wish.slo, before.family)
    assert (found.epoch, found.previous) == (before.epoch + 1, before.digest)
    more = wish.model_copy(update={"settings": SETTINGS.model_copy(update={"max_queued": 1})})
    assert propose(snapshot, more, need, world.now).plan.routes != before.routes

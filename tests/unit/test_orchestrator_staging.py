"""What agents are to have on their disks ahead of need, and how seldom they are told."""

from dataclasses import replace
from datetime import datetime, timedelta

from orchestrator.decision import Origin
from orchestrator.fold import CapacityReceived, DeploymentRemoved, DeploymentWritten, NodeWished, fold
from orchestrator.staging import (
    AGAIN,
    AVERAGED_S,
    HISTORY_MAX,
    KEPT,
    History,
    advice_for,
    averaged,
    due,
    permitted,
    ranked,
    remembered,
    to_stage,
    worth,
)
from profiler.objective import Objective
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Service, StoredBlocks
from schemas.deployment import NodeWish
from tests.trigger_world import CHAT, MODEL, START, World
from tests.unit.test_orchestrator_cold import ONE, THREE, TWO, cluster_of
from tests.unit.test_orchestrator_planning import A

N0, N1, N2 = (NodeId(f"n{i}") for i in range(3))


def weighed(nodes: int = 3) -> World:
    world = World(nodes, 0, noise=0.0)
    world.look()
    return world


def test_every_block_of_every_failover_is_advised_to_the_node_that_would_run_it() -> None:
    world = weighed()
    failovers = world.snapshot.outlooks[CHAT].failovers
    assert set(failovers) == set(world.plan.nodes)
    advised = to_stage(world.snapshot, {})[CHAT]
    for stage in (stage for chains in failovers.values() for chain in chains for stage in chain):
        assert set(stage.blocks) <= advised[stage.node].blocks


def test_a_better_plan_that_waits_to_repay_the_move_is_advised_too() -> None:
    world = weighed()
    before = to_stage(world.snapshot, {})[CHAT]
    world.slow[NodeId(world.plan.nodes[0])] = 1.3
    world.run(6)
    decision = world.snapshot.outlooks[CHAT].decision
    assert not decision.acts, "the move has not repaid itself yet"
    better = [one.option for one in decision.runners_up if one.option.phi < decision.current.phi]
    assert better, "another plan is better now"
    after = to_stage(world.snapshot, {CHAT: before})[CHAT]
    best = next(option for option in better if option.origin.value in ("resplit", "reassigned"))
    assert all(set(stage.blocks) <= after[stage.node].blocks for chain in best.chains for stage in chain)


def test_until_a_new_plan_is_weighed_the_advice_stands_and_then_goes_with_its_deployment() -> None:
    world = weighed()
    before = to_stage(world.snapshot, {})
    outlook = world.snapshot.outlooks[CHAT]
    stale = {**world.snapshot.outlooks, CHAT: type(outlook)(CHAT, MODEL, outlook.decision, outlook.state)}
    changed = type(world.snapshot)(**{**vars(world.snapshot), "outlooks": stale})
    assert to_stage(changed, before) == before
    assert to_stage(fold(world.snapshot, DeploymentRemoved(CHAT), START), before) == {}


def test_an_agent_is_told_when_something_changed_when_it_restarted_and_when_it_lacks_it_for_long() -> None:
    world = weighed()
    node = world.heartbeat(N0).model_copy(update={"on_disk": ()})
    advice = (StoredBlocks.of(MODEL, (1, 2)),)
    present, said = {N0: node}, {N0: (node.boot, advice, START)}
    assert due(present, {N0: advice}, {}, START) == {N0: advice}
    assert due(present, {N0: advice}, said, START) == {}
    other = (StoredBlocks.of(MODEL, (1, 2, 3)),)
    assert due(present, {N0: other}, said, START) == {N0: other}
    assert due(present, {}, said, START) == {N0: ()}, "what is wanted no more"
    restarted = {N0: node.model_copy(update={"boot": "another"})}
    assert due(restarted, {N0: advice}, said, START) == {N0: advice}
    assert due(restarted, {}, said, START) == {}, "it knows of nothing"
    later = START + AGAIN
    assert due(present, {N0: advice}, said, later - timedelta(seconds=1)) == {}
    assert due(present, {N0: advice}, said, later) == {N0: advice}
    has = {N0: node.model_copy(update={"on_disk": (StoredBlocks.of(MODEL, range(8)),)})}
    assert due(has, {N0: advice}, said, later) == {}


def test_deployments_of_one_model_are_one_advice_to_a_node() -> None:
    plans = {
        DeploymentName("a"): {N0: StoredBlocks.of(MODEL, (0, 1))},
        DeploymentName("b"): {N0: StoredBlocks.of(MODEL, (1, 4))},
    }
    assert advice_for(N0, ((plans, START),)) == (StoredBlocks(model=MODEL, ranges=((0, 1), (4, 4))),)
    assert advice_for(N1, ((plans, START),)) == ()


def test_what_was_wanted_lately_is_kept_for_a_while_and_what_is_removed_is_not() -> None:
    one, other = ({CHAT: {N0: StoredBlocks.of(MODEL, (block,))}} for block in (1, 2))
    history = remembered(remembered((), one, START), other, START + KEPT / 2)
    assert advice_for(N0, history)[0].blocks == {1, 2}
    assert advice_for(N0, remembered(history, other, START + KEPT))[0].blocks == {2}
    assert advice_for(N0, remembered(history, {}, START + KEPT / 2)) == ()
    for second in range(3 * HISTORY_MAX):
        changing = {CHAT: {N0: StoredBlocks.of(MODEL, (second,))}}
        history = remembered(history, changing, START + KEPT / 2 + timedelta(seconds=second / 10))
    assert len(history) == HISTORY_MAX


def test_noise_does_not_have_agents_told_again_and_again() -> None:
    world = World(4, 3, noise=0.2)
    world.look()
    plans, told = to_stage(world.snapshot, {}), 0
    history: History = ()
    said: dict[NodeId, tuple[str, tuple[StoredBlocks, ...], datetime]] = {}
    for _ in range(60):
        world.run(5)
        plans = to_stage(world.snapshot, plans)
        history = remembered(history, plans, world.now)
        wanted = {node: advice_for(node, history) for node in world.snapshot.offered}
        for node, advice in due(world.snapshot.present, wanted, said, world.now).items():
            said[node] = (world.snapshot.present[node].boot, advice, world.now)
            told += 1
    assert len(world.names) <= told <= 6 * len(world.names), "each a few times, of sixty"


def test_an_agent_says_which_blocks_it_has() -> None:
    world = weighed()
    heard = fold(world.snapshot, CapacityReceived(world.heartbeat(N2)), START)
    assert heard.nodes[N2].capacity.on_disk == (StoredBlocks(model=MODEL, ranges=((0, 7),)),)


def test_a_node_that_is_distrusted_is_told_no_sensitive_block_any_more_whatever_was_wanted_before() -> None:
    world = weighed()
    wish = world.wish.model_copy(update={"sensitive": "ends"})
    snapshot = fold(world.snapshot, DeploymentWritten(wish), START)
    history = remembered((), {CHAT: {N0: StoredBlocks.of(MODEL, range(8)), N1: StoredBlocks.of(MODEL, (0,))}}, START)
    assert permitted(snapshot, history) == history
    for node in (N0, N1):
        snapshot = fold(snapshot, NodeWished(NodeWish(node=node, trusted=False)), START)
    assert advice_for(N0, permitted(snapshot, history))[0].blocks == set(range(1, 7))
    assert advice_for(N1, permitted(snapshot, history)) == ()


def test_a_route_more_is_advised_before_it_is_worth_its_price() -> None:
    world = weighed()
    outlook = world.snapshot.outlooks[CHAT]
    runner = next(one for one in outlook.decision.runners_up if one.option.nodes - set(world.plan.nodes))
    added, given_back = Origin.ROUTE_ADDED, Origin.ROUTE_GIVEN_BACK
    for origin, phi, wanted in ((added, 0.0, True), (added, 99.0, True), (given_back, 0.0, False)):
        better = replace(runner, option=replace(runner.option, origin=origin, objective=Objective(phi, 0.0, 0.0)))
        alone = replace(outlook, failovers={}, decision=replace(outlook.decision, runners_up=(better,)))
        snapshot = replace(world.snapshot, outlooks={CHAT: alone})
        assert bool(to_stage(snapshot, {})[CHAT]) is wanted


def test_a_disk_is_for_what_is_worth_most_first() -> None:
    cluster = cluster_of(ONE, TWO, THREE)
    snapshot, often, seldom = cluster.mind.snapshot, 1.0, 0.001
    assert cluster.states() == {ONE: "serving", TWO: "cold", THREE: "cold"}
    values = worth(snapshot, {ONE: often, TWO: seldom, THREE: often})
    assert values[THREE] > values[TWO] > 0.0
    assert values[THREE] > values[ONE], "a cold one is loaded whenever it is asked for, a node fails once in an hour"
    assert worth(snapshot, {})[ONE] > worth(snapshot, {})[TWO], "what nobody asks for is worth less than a failover"
    plans = {
        name: {N0: StoredBlocks.of(Digest(f"{number:064x}"), (0, 1))} for number, name in enumerate((ONE, TWO, THREE))
    }
    history: History = ((plans, START),)
    order = [int(stored.model, 16) for stored in advice_for(N0, history, ranked(values))]
    assert order[0] == 2
    assert [int(stored.model, 16) for stored in advice_for(N0, history)] == [0, 1, 2]


def test_what_is_worth_about_as_much_is_not_told_in_another_order() -> None:
    assert ranked({ONE: 1.0, TWO: 1.9}) == {ONE: 0.0, TWO: 0.0}
    assert ranked({ONE: 1.0, TWO: 4.0, THREE: 0.0})[TWO] == 2.0


def test_how_often_a_deployment_is_asked_for_is_an_average_over_half_an_hour() -> None:
    cluster = cluster_of(ONE, TWO)
    said = cluster.nodes[A].beat().capacity
    counted = said.model_copy(update={"service": (Service(deployment=TWO, arrived=60),)})
    cluster.mind.fold(CapacityReceived(counted), cluster.now)
    snapshot = cluster.mind.snapshot
    after = averaged({}, snapshot, cluster.now, 1.0)
    assert after[ONE] == 0.0 < after[TWO] < 0.1
    assert averaged(after, snapshot, cluster.now, AVERAGED_S)[TWO] > 1.0
    assert averaged({ONE: 5.0}, fold(snapshot, DeploymentRemoved(ONE), START), cluster.now, 1.0).keys() == {TWO}

"""Several routes, tiers, prices and trust: what the planner decides, and what it never does."""

from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.arrivals import PEAK, Arrivals
from orchestrator.candidates import slate
from orchestrator.chain import beside
from orchestrator.decide import Cause, DropCandidate, Need, Replan, conforms, decide, exposed_by, reclassed
from orchestrator.decision import Action, Origin, placement_text
from orchestrator.demand import running
from orchestrator.explaining import dry_run
from orchestrator.fold import DeploymentWritten, NodeWished, RolloutAdvanced, fold
from orchestrator.habits import Habit
from orchestrator.moving import Live, Placed, Prices, Way, move_cost, reaches_of
from orchestrator.operators import placed
from orchestrator.planner import check_shape, make_plan
from orchestrator.proposing import propose
from orchestrator.rollout import Propose, step
from orchestrator.rooms import believed_rooms, rooms
from orchestrator.trial import check_distrust, exposed_on, trial
from orchestrator.trigger import DEFAULT_POLICY
from orchestrator.view import status
from orchestrator.weighing import weigh, weighable
from profiler.forecast import forecast, shared_out
from profiler.host import hosts_of
from profiler.objective import Demand
from schemas.base import NodeId
from schemas.deployment import Deployment, NodeWish, Placement, Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.slo import Slo
from tests.trigger_world import BLOCK_BYTES, CHAT, MODEL, SETTINGS, START, World, manifest

N0, N1, N2, N3 = (NodeId(f"n{i}") for i in range(4))
RIVAL = NodeId("n9")
OTHER_CLASS = {"ttft_ms": 500.0, "priority": 1}


def wish(**fields: object) -> Deployment:
    return Deployment.model_validate({"name": CHAT, "model": MODEL, "settings": SETTINGS, **fields})


def quiet(nodes: int = 4, room: float = 9.0, **fields: object) -> World:
    return World(nodes, 0, noise=0.0, room=room, **fields)  # type: ignore[arg-type]


def chain(*parts: tuple[NodeId, int, int]) -> tuple[Stage, ...]:
    return tuple(Stage(node=node, first=first, last=last) for node, first, last in parts)


def said(world: World, node: NodeId, trusted: bool) -> None:
    world.snapshot = fold(world.snapshot, NodeWished(NodeWish(node=node, trusted=trusted)), world.now)


def refused(deployment: Deployment, world: World) -> tuple[ErrorCode, str | None, str]:
    with pytest.raises(ResplitError) as caught:
        trial(world.snapshot, deployment, manifest(), START)
    return caught.value.code, caught.value.field, caught.value.message


def test_without_demand_there_is_one_route_and_as_many_as_are_asked_for() -> None:
    assert len(quiet().plan.routes) == 1
    world = quiet(wish=wish(routes=3))
    assert placement_text(world.plan.chains) == "n0:0-7 | n1:0-7 | n2:0-7"
    assert sum(route.max_sequences for route in world.plan.routes) == SETTINGS.max_sequences
    assert "3 routes over 3 nodes" in world.plan.reason
    assert conforms(world.plan, world.wish)
    assert not conforms(world.plan, wish(routes=2))


def test_a_faster_route_gets_more_of_the_sequences() -> None:
    assert shared_out(32, (0.75, 0.25)) == (24, 8)
    assert shared_out(3, (0.98, 0.01, 0.01)) == (1, 1, 1)
    assert sum(shared_out(32, (0.1, 0.2, 0.3, 0.4))) == 32
    world = quiet(2)
    world.slow[N1] = 3.0
    world.hear()
    world.run(20)
    made = make_plan(wish(routes=2), manifest(), rooms(world.snapshot, world.wish, manifest()), 2, None, "a test").plan
    first, second = made.routes
    assert (first.stages[0].node, second.stages[0].node) == (N0, N1)
    assert first.max_sequences == pytest.approx(24, abs=1)


def test_a_node_serves_two_routes_with_blocks_that_it_holds_once() -> None:
    # Two nodes hold half each, and a third one half: the other half is shared.
    world = quiet(3, room=4.5, wish=wish(routes=2))
    first, second = world.plan.chains
    shared = {s.node for s in first} & {s.node for s in second}
    assert len(shared) == 1
    assert len({s.node for c in (first, second) for s in c}) == 3
    assert all(len(world.plan.blocks_on(node)) == 4 for node in world.plan.nodes)
    nodes = hosts_of(world.snapshot.present, manifest(), MODEL)
    found = forecast(world.plan.chains, nodes, manifest(), demand=Demand(1.0, batch=4))
    alone = forecast((first,), nodes, manifest(), demand=Demand(0.5, batch=2))
    [loaded] = [node for node in found.routes[0].nodes if node.node in shared]
    [lonely] = [node for node in alone.routes[0].nodes if node.node in shared]
    assert loaded.rho == pytest.approx(2 * lonely.rho)
    assert found.copies == pytest.approx(1.5)


def test_a_route_brings_a_node_that_serves_none_yet() -> None:
    world = quiet(1)
    assert refused(wish(routes=2), world) == (
        ErrorCode.INFEASIBLE,
        "routes",
        "2 routes are asked for, and 1 fit(s) beside one another on the nodes that are here; ask for 1, or add nodes",
    )
    world = quiet(2, wish=wish(routes=2))
    left = beside(rooms(world.snapshot, world.wish, manifest()), world.plan.chains)
    assert all(room.need_bytes == (0,) * 8 for room in left.values())
    few = wish(routes=3, settings=Settings(context_tokens=1024, max_sequences=2))
    with pytest.raises(ResplitError) as caught:
        check_shape(few, manifest())
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "routes")


def test_routes_come_with_the_work_and_go_when_it_is_gone() -> None:
    world = World(4, 0, noise=0.2, room=9.0)
    counts = []
    for sequences in (0, 32, 0):
        world.sequences = sequences
        world.run(200)
        counts.append(len(world.plan.routes))
    assert counts == [1, 2, 1]
    added, ended = world.moves
    assert added.action is ended.action is Action.ROUTES
    assert added.sentence.startswith("Go from 1 route to 2 routes: add ")
    assert ended.sentence.startswith("Go from 2 routes to 1 route: end ")


def test_a_route_that_was_needed_to_keep_a_promise_stays_for_as_long_as_the_load_may_come_back() -> None:
    promised = quiet(wish=wish(slo=Slo(ttft_ms=600)))
    promised.sequences = 24
    promised.run(120)
    assert len(promised.plan.routes) == 2
    promised.sequences = 0
    promised.run(PEAK.total_seconds() - 30)
    assert len(promised.plan.routes) == 2
    promised.run(120)
    assert len(promised.plan.routes) == 1


def test_a_route_is_looked_for_where_requests_wait_though_one_at_a_time_runs() -> None:
    world = quiet(wish=wish(slo=Slo(ttft_ms=600)))
    world.run(30)
    assert not any(option.origin is Origin.ROUTE_ADDED for option in world.observed().options)
    came = Arrivals(START).more(60, world.now - timedelta(seconds=1))
    world.snapshot = replace(world.snapshot, arrivals={CHAT: came})
    assert all(world.running_on(name) == 0 for name in world.names)
    assert any(option.origin is Origin.ROUTE_ADDED for option in world.observed().options)


def test_a_load_that_stays_moves_nothing_under_noise() -> None:
    world = World(3, 0, noise=0.2, room=9.0)
    world.sequences = 8
    world.run(300)
    assert [move.sentence for move in world.moves] == []


def test_the_number_of_routes_that_is_asked_for_is_not_weighed() -> None:
    world = quiet(wish=wish(routes=2))
    world.sequences = 24  # of fewer the fast route would take nearly all
    world.run(120)
    assert (world.moves, len(world.plan.routes)) == ([], 2)
    world.slow[world.plan.chains[1][0].node] = 4.0
    world.run(60)
    assert [move.action for move in world.moves] == [Action.REDISTRIBUTE]
    assert len(world.plan.routes) == 2


def test_only_the_broken_route_is_replaced_and_dropped_where_nothing_else_fits() -> None:
    world = quiet(3, wish=wish(routes=2))
    world.look()
    stays, lost = world.plan.chains[0], world.plan.chains[1][0].node
    gone = replace(world.snapshot, absent=frozenset({lost}))
    ready = propose(gone, world.wish, Need(Cause.NODE_LOST, f"lost: {lost}"), world.now).plan
    assert ready.chains == (stays, chain((N2, 0, 7)))
    assert "was ready" in ready.reason
    assert (Stage(node=N2, first=0, last=7),) in world.snapshot.outlooks[CHAT].failovers[lost]
    solved = propose(replace(gone, outlooks={}), world.wish, Need(Cause.NODE_LOST, f"lost: {lost}"), world.now).plan
    assert solved.chains == ready.chains
    alone = replace(gone, absent=frozenset({lost, N2}))
    one = propose(alone, world.wish, Need(Cause.NODE_LOST, "lost"), world.now).plan
    assert one.chains == (stays,)


def test_a_route_that_is_missing_is_added_once_it_fits_and_what_serves_is_weighed_meanwhile() -> None:
    world = quiet(2, wish=wish(routes=2))
    lost = world.plan.chains[1][0].node
    world.snapshot = replace(world.snapshot, absent=frozenset({lost}))
    world.adopt(propose(world.snapshot, world.wish, Need(Cause.NODE_LOST, "lost"), world.now).plan)
    assert len(world.plan.routes) == 1
    [asked] = decide(world.snapshot, world.now)
    assert isinstance(asked, Replan)
    assert (asked.need.cause, asked.need.hard) == (Cause.MISSING_ROUTE, False)
    with pytest.raises(ResplitError, match="2 routes are asked for, and 1 fit"):
        propose(world.snapshot, world.wish, asked.need, world.now)
    assert weighable(world.snapshot, world.now) == (CHAT,)
    assert status(world.snapshot, world.now).deployments[0].state == "changing"
    back = replace(world.snapshot, absent=frozenset())
    assert len(propose(back, world.wish, asked.need, world.now).plan.routes) == 2


def test_candidates_never_repeat_a_route_however_fast_its_node_is() -> None:
    world = quiet(2, wish=wish())
    both: Placement = (chain((N0, 0, 7)), chain((N1, 0, 7)))
    world.adopt(
        make_plan(wish(placement=both), manifest(), rooms(world.snapshot, world.wish, manifest()), 2, None, "a").plan
    )
    world.slow[N1] = 9.0
    world.sequences = 1  # it is of no use to more
    world.run(40)
    for decision in world.decisions:
        for option in (decision.current, *(other.option for other in decision.runners_up)):
            assert len({stage.node for c in option.chains for stage in c}) >= len(option.chains)
    assert world.plan.chains == both[:1]


def test_a_placement_of_several_routes_is_checked_like_one() -> None:
    world = quiet(3, room=4.5)
    halves: Placement = (chain((N0, 0, 3), (N1, 4, 7)), chain((N0, 0, 3), (N2, 4, 7)))
    assert trial(world.snapshot, wish(placement=halves), manifest(), START).plan.chains == halves
    assert wish(placement=halves[0]).chains == (halves[0],)
    cases = [
        ((halves[0], halves[0]), ErrorCode.INVALID_REQUEST, "placement.1"),
        ((halves[0], halves[1][:1]), ErrorCode.INVALID_REQUEST, "placement.1.0.last"),
        ((halves[0], chain((N0, 0, 3), (RIVAL, 4, 7))), ErrorCode.INFEASIBLE, "placement.1.1.node"),
        ((halves[0], chain((N2, 0, 3), (N0, 4, 7))), ErrorCode.INFEASIBLE, "placement.0.0.node"),
        (((), halves[0]), ErrorCode.INVALID_REQUEST, "placement.0"),
    ]
    for placement, code, field in cases:
        assert refused(wish(placement=placement), world)[:2] == (code, field)
    assert refused(wish(placement=halves, routes=3), world)[:2] == (ErrorCode.INVALID_REQUEST, "routes")
    assert placed(wish(routes=3), halves).routes is None
    assert placed(wish(routes=2), halves).routes == 2


def test_only_the_sequences_of_a_route_that_changes_cross() -> None:
    world = quiet(3)
    both: Placement = (chain((N0, 0, 7)), chain((N1, 0, 7)))
    nodes = {name: world.heartbeat(name) for name in world.names}
    caching = manifest()
    two = Placed(both, 2.0, 40.0, (0.5, 0.5))
    one = Placed(both[:1], 2.0, 40.0)
    live = Live(8, 100, 50)
    assert move_cost(one, two, reaches_of(nodes, MODEL), caching, live, Prices()).way is Way.NONE
    assert [node.node for node in move_cost(one, two, reaches_of(nodes, MODEL), caching, live, Prices()).nodes] == [N1]


def test_a_cloud_node_is_used_where_the_edge_cannot_hold_the_model() -> None:
    world = quiet(3, room=3.0, prices={N2: 1.0})
    assert world.plan.blocks_on(N2)
    assert not quiet(3, room=4.5, prices={N2: 1.0}).plan.blocks_on(N2)


@pytest.mark.parametrize(
    ("slower", "price", "trusted", "used"),
    [
        (1.1, 0.0, True, False),
        (3.0, 0.5, True, True),
        (3.0, 12.0, True, False),
        (3.0, 0.5, False, False),
    ],
)
def test_a_cloud_node_has_to_be_worth_its_price_and_what_it_sees(
    slower: float, price: float, trusted: bool, used: bool
) -> None:
    world = quiet(2, prices={N1: price})
    said(world, N1, trusted)
    world.slow[N0] = slower
    world.run(60)
    made = make_plan(world.wish, manifest(), rooms(world.snapshot, world.wish, manifest()), 9, None, "a test").plan
    assert (N1 in world.plan.nodes) is used
    assert (N1 in made.nodes) is used


def test_the_price_and_the_privacy_of_a_plan_stand_among_its_terms() -> None:
    world = quiet(2, prices={N1: 2.0})
    options = slate(world.snapshot, world.wish, manifest(), world.plan, now=world.now).observation.options
    [rented] = [option for option in options if N1 in option.nodes]
    assert rented.objective.terms["phi_cost"] == pytest.approx(0.5)
    assert rented.objective.terms["phi_privacy"] > 4
    assert rented.terms["price_per_hour"] == 2.0


def test_the_operators_word_on_trust_goes_before_the_tier() -> None:
    world = quiet(2, prices={N1: 1.0})
    assert [world.snapshot.trusts(node) for node in (N0, N1, RIVAL)] == [True, False, False]
    said(world, N0, False)
    said(world, N1, True)
    assert [world.snapshot.trusts(node) for node in (N0, N1)] == [False, True]
    assert [node.trusted for node in status(world.snapshot, world.now).nodes] == [False, True]
    drained = fold(world.snapshot, NodeWished(world.snapshot.wish(N1).model_copy(update={"drained": True})), START)
    assert drained.wish(N1) == NodeWish(node=N1, drained=True, trusted=True)


def test_one_trusted_node_holds_both_ends_and_others_the_middle() -> None:
    world = quiet(3, room=4.5, prices={N1: 0.1, N2: 0.1}, wish=wish(sensitive="ends"))
    first, *middle, last = world.plan.chains[0]
    assert (first.node, last.node, first.first, last.last) == (N0, N0, 0, 7)
    assert middle
    assert {stage.node for stage in middle} <= {N1, N2}


def test_what_is_sensitive_and_fits_on_no_trusted_node_is_refused() -> None:
    world = quiet(2, room=6.0, prices={N1: 0.1})
    world.snapshot = replace(world.snapshot, rollouts={})
    world.hear()
    code, field, message = refused(wish(sensitive="all"), world)
    assert (code, field) == (ErrorCode.INFEASIBLE, "sensitive")
    assert f"{2 * BLOCK_BYTES} bytes short" in message
    cloudy = quiet(2, prices={N0: 0.1, N1: 0.1})
    code, field, message = refused(wish(sensitive=(3,)), cloudy)
    assert (code, field) == (ErrorCode.INFEASIBLE, "sensitive")
    assert "block 3 of 'toy' is sensitive and none of the 0 trusted node(s)" in message
    with pytest.raises(ResplitError) as strange:
        check_shape(wish(sensitive=(0, 8)), manifest())
    assert (strange.value.code, strange.value.field) == (ErrorCode.INVALID_REQUEST, "sensitive")
    locked = wish(sensitive="ends", placement=chain((N0, 0, 7)))
    code, field, message = refused(locked, cloudy)
    assert (code, field) == (ErrorCode.INFEASIBLE, "placement.0.node")
    assert "block 0 is sensitive and node 'n0' is not trusted" in message


def test_a_node_that_is_distrusted_loses_its_sensitive_blocks_at_once() -> None:
    world = quiet(3, wish=wish(sensitive="ends"))
    node = NodeId(world.plan.nodes[0])
    check_distrust(world.snapshot, node, world.now)
    said(world, node, False)
    assert exposed_on(world.snapshot, node) == (CHAT,)
    [asked] = decide(world.snapshot, world.now)
    assert isinstance(asked, Replan)
    assert (asked.need.cause, asked.need.hard) == (Cause.TRUST_CHANGED, True)
    assert asked.need.reason == f"block 0 is sensitive and node {node}, which holds it, is not trusted"
    plan = propose(world.snapshot, world.wish, asked.need, world.now).plan
    assert node not in plan.nodes
    seen = dry_run(world.snapshot, CHAT, DEFAULT_POLICY, world.now).decision
    assert (seen.action, "is not trusted" in seen.sentence) == ("hard", True)
    assert status(world.snapshot, world.now).deployments[0].state == "degraded"
    # What is being prepared is dropped before it commits.
    taken = step(world.snapshot.rollout(CHAT), Propose(plan, hard=True), world.now)
    assert taken is not None
    world.snapshot = fold(world.snapshot, RolloutAdvanced(taken[0]), world.now)
    assert decide(world.snapshot, world.now) == ()
    said(world, NodeId(plan.nodes[0]), False)
    assert isinstance(decide(world.snapshot, world.now)[0], DropCandidate)


def test_distrust_is_refused_where_what_is_sensitive_fits_nowhere_else() -> None:
    world = quiet(1, wish=wish(sensitive="all"))
    with pytest.raises(ResplitError, match="'chat' cannot keep its sensitive blocks off node 'n0'") as caught:
        check_distrust(world.snapshot, N0, world.now)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INFEASIBLE, "node")
    with pytest.raises(ResplitError) as unknown:
        check_distrust(world.snapshot, RIVAL, world.now)
    assert unknown.value.code is ErrorCode.UNKNOWN_NODE
    free = fold(world.snapshot, DeploymentWritten(wish()), world.now)
    check_distrust(free, N0, world.now)


def test_no_candidate_and_no_failover_shows_what_is_sensitive() -> None:
    world = quiet(4, room=4.5, prices={N2: 0.0, N3: 0.0}, wish=wish(sensitive="ends"))
    world.slow = {N0: 3.0, N1: 3.0}
    world.sequences = 24
    world.run(30)
    outlook = weigh(world.snapshot, CHAT, DEFAULT_POLICY, world.now)
    everything = [outlook.decision.current, *(other.option for other in outlook.decision.runners_up)]
    assert any(option.origin is Origin.RESPLIT for option in everything) or len(everything) > 1
    for chains in (*outlook.failovers.values(), *(option.chains for option in everything)):
        assert {stage.node for c in chains for stage in c if {0, 7} & set(stage.blocks)} <= {N0, N1}


def test_a_node_that_was_not_heard_yet_is_no_reason_to_move_unless_the_operator_distrusts_it() -> None:
    world = quiet(3, wish=wish(sensitive="ends"))
    node = NodeId(world.plan.nodes[0])
    cold = replace(world.snapshot, nodes={})
    assert exposed_by(cold, world.wish, world.plan) is None
    assert decide(cold, world.now) == ()
    distrusted = fold(cold, NodeWished(NodeWish(node=node, trusted=False)), world.now)
    assert exposed_by(distrusted, world.wish, world.plan) is not None


def test_a_new_class_waits_for_nodes_that_a_new_leader_has_not_heard_yet() -> None:
    world = quiet(3)
    other = wish(slo=OTHER_CLASS)
    assert reclassed(world.plan, other) is not None
    snapshot = fold(world.snapshot, DeploymentWritten(other), world.now)
    cold = replace(snapshot, nodes={n: x for n, x in snapshot.nodes.items() if n not in world.plan.nodes})
    assert decide(cold, world.now) == ()
    [asked] = decide(snapshot, world.now)
    assert isinstance(asked, Replan)
    assert asked.need.cause is Cause.WISH_CHANGED
    assert propose(snapshot, other, asked.need, world.now).plan.chains == world.plan.chains
    assert propose(cold, other, asked.need, world.now).plan.slo == other.slo


def test_a_deployment_that_takes_sealed_requests_alone_keeps_its_plan_and_says_so_in_it() -> None:
    world = quiet(3)
    other = wish(sealed=True)
    snapshot = fold(world.snapshot, DeploymentWritten(other), world.now)
    [asked] = decide(snapshot, world.now)
    assert isinstance(asked, Replan)
    found = propose(snapshot, other, asked.need, world.now).plan
    assert (found.chains, found.sealed, found.family) == (world.plan.chains, True, world.plan.family)
    assert conforms(found, other)
    assert not conforms(found, wish())


def test_the_ingress_of_a_deployment_that_takes_sealed_requests_alone_is_trusted() -> None:
    world = quiet(3, wish=wish(sealed=True))
    node = NodeId(world.plan.routes[0].source)
    assert exposed_by(world.snapshot, world.wish, world.plan) is None
    distrusted = fold(world.snapshot, NodeWished(NodeWish(node=node, trusted=False)), world.now)
    assert exposed_by(distrusted, world.wish, world.plan) is not None


def test_a_new_class_while_a_node_drains_comes_with_the_plan_that_leaves_it() -> None:
    world = quiet(3)
    other, node = wish(slo=OTHER_CLASS), NodeId(world.plan.nodes[0])
    snapshot = fold(world.snapshot, NodeWished(NodeWish(node=node, drained=True)), world.now)
    snapshot = fold(snapshot, DeploymentWritten(other), world.now)
    [asked] = decide(snapshot, world.now)
    assert isinstance(asked, Replan)
    plan = propose(snapshot, other, asked.need, world.now).plan
    assert (node in plan.nodes, plan.slo) == (False, other.slo)
    taken = step(snapshot.rollout(CHAT), Propose(plan), world.now)
    assert taken is not None
    assert decide(fold(snapshot, RolloutAdvanced(taken[0]), world.now), world.now) == ()


def test_sequences_on_a_node_that_serves_two_routes_are_counted_once() -> None:
    world = quiet(2)
    deployment = wish(placement=(chain((N0, 0, 7)), chain((N0, 0, 3), (N1, 4, 7))))
    free = rooms(world.snapshot, deployment, manifest())
    world.adopt(make_plan(deployment, manifest(), free, 2, None, "a test").plan)
    world.sequences = 16
    world.hear()
    assert world.running_on(N0) == 16 > world.running_on(N1) > 0
    live = running(world.snapshot, CHAT, world.plan, manifest(), Habit())
    assert live.sequences == 16


def test_what_was_measured_here_is_not_held_against_what_a_roofline_promises_there() -> None:
    world = quiet(2)
    ran = world.snapshot.nodes[N0]
    slowed = {model: times.slower(3) for model, times in ran.times.items()}
    idle = world.snapshot.nodes[N1]
    idle = replace(idle, times={}, capacity=idle.capacity.model_copy(update={"block_times": ()}))
    snapshot = replace(world.snapshot, nodes={N0: replace(ran, times=slowed), N1: idle})
    seen = believed_rooms(snapshot, world.wish, manifest())
    assert seen.keys() == rooms(snapshot, world.wish, manifest()).keys()
    assert seen[N1].host.times.decode_ms[0] > seen[N0].host.times.decode_ms[0]


def test_a_node_beside_another_route_is_slower_in_every_term() -> None:
    world = quiet(2)
    free = rooms(world.snapshot, world.wish, manifest())
    shared = beside(free, (chain((N0, 0, 7)),))[N0]
    assert shared.host.times.ms.tolist() == (2 * free[N0].host.times.ms).tolist()
    assert shared.host.times.ms.any(axis=1).sum() > 1

"""A deployment with a cloud: cold where nothing has room for it, loaded as soon as something has, and kept here where
it must not leave."""

import pytest

from orchestrator.decide import conforms, reclassed
from orchestrator.fold import CapacityReceived
from orchestrator.trial import check_cloud, trial
from orchestrator.view import status
from schemas.audit import AuditKind
from schemas.capacity import CloudCount, Service
from schemas.control import CloudStatus
from schemas.deployment import Cloud
from schemas.errors import ErrorCode, ResplitError
from tests.unit.test_orchestrator_cold import ONE, TWO, Cluster, Node
from tests.unit.test_orchestrator_planning import START, A, B, C, heartbeat, manifest, wish, world

EU = Cloud(name="eu", model="big-1")


def test_what_fits_nowhere_is_cold_and_is_loaded_once_a_node_comes_that_has_room() -> None:
    cluster = Cluster(Node(A, 2.0), Node(B, 1.0))
    cluster.deploy(ONE, on_demand=False, cloud=EU)
    assert cluster.state(ONE) == "cold"
    current = cluster.mind.snapshot.rollout(ONE).current
    assert current is not None
    assert (current.cold, current.cloud) == (True, EU)
    epoch = current.epoch
    cluster.run(30)
    current = cluster.mind.snapshot.rollout(ONE).current
    assert current is not None
    assert current.epoch == epoch, "it is not planned anew for nothing"
    cluster.nodes[C] = Node(C, 4.5)
    cluster.run(40)
    assert cluster.state(ONE) == "serving"
    current = cluster.mind.snapshot.rollout(ONE).current
    assert current is not None
    assert (current.cold, current.cloud) == (False, EU)


def test_what_serves_is_cold_once_its_node_is_gone_and_a_door_that_is_lost_is_replaced() -> None:
    cluster = Cluster(Node(A, 4.5), Node(B, 0.5), Node(C, 0.5))
    cluster.deploy(ONE, on_demand=False, cloud=EU)
    assert cluster.state(ONE) == "serving"
    del cluster.nodes[A]
    cluster.run(10)
    assert cluster.state(ONE) == "cold"
    current = cluster.mind.snapshot.rollout(ONE).current
    assert current is not None
    assert set(current.nodes) == {B, C}
    del cluster.nodes[B]
    cluster.run(10)
    current = cluster.mind.snapshot.rollout(ONE).current
    assert current is not None
    assert current.nodes == (C,)


def test_others_on_demand_make_room_before_a_cloud_is_needed() -> None:
    cluster = Cluster(Node(A, 4.5), Node(B, 0.5))
    cluster.deploy(ONE)
    cluster.deploy(TWO, on_demand=False, cloud=EU)
    cluster.run(10)
    assert cluster.states() == {ONE: "cold", TWO: "serving"}


def test_doors_are_where_the_cloud_is_known() -> None:
    cluster = Cluster(Node(A, 1.0), Node(B, 1.0), Node(C, 1.0))
    knows = cluster.nodes[C].beat().capacity.model_copy(update={"clouds": ("eu",), "sequence": 50})
    cluster.mind.fold(CapacityReceived(knows), START)
    snapshot = cluster.mind.snapshot
    found = trial(snapshot, wish(name=ONE, cloud=EU), manifest(), START)
    assert found.plan.routes[0].source == C
    check_cloud(snapshot, wish(name=ONE, cloud=EU))
    with pytest.raises(ResplitError, match="they know: eu") as caught:
        check_cloud(snapshot, wish(name=ONE, cloud=Cloud(name="us", model="m")))
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "cloud.name")


def test_what_must_stay_here_has_no_cloud_whoever_says_so() -> None:
    open_one = wish(name=ONE, cloud=EU)
    plan = trial(world(heartbeat(A, 4.5)), open_one, manifest(), START).plan
    assert plan.cloud == EU
    for shy in ({"sensitive": "ends"}, {"sealed": True}, {"ruled": ("all",)}):
        one = open_one.model_copy(update=shy)
        assert one.outside is None
        assert not conforms(plan, one)
        with pytest.raises(ResplitError) as caught:
            check_cloud(world(heartbeat(A, 4.5)), one)
        assert (caught.value.code, caught.value.field) == (ErrorCode.FORBIDDEN, "cloud")
    ruled = open_one.model_copy(update={"ruled": ("ends",)})
    kept = reclassed(plan, ruled)
    assert kept is not None
    assert (kept.cloud, kept.chains) == (None, plan.chains), "nothing moves for that"


def test_another_cloud_moves_nothing_and_status_tells_what_it_was_asked() -> None:
    cluster = Cluster(Node(A, 4.5), Node(B, 0.5))
    deployment = cluster.deploy(ONE, on_demand=False, cloud=EU)
    before = cluster.mind.snapshot.rollout(ONE).current
    cluster.deploy(ONE, on_demand=False, cloud=Cloud(name="eu", model="big-2"))
    after = cluster.mind.snapshot.rollout(ONE).current
    assert before is not None and after is not None
    assert (after.chains, after.epoch) == (before.chains, before.epoch + 1)
    assert after.cloud is not None and after.cloud.model == "big-2"
    assert deployment.cloud == EU
    counted = Service(deployment=ONE, cloud=CloudCount(asked=4, answered=3, total_ms=600.0, cost=1.5))
    found = told_of(cluster, counted)
    assert (found.asked, found.answered, found.mean_ms, found.cost, found.nodes) == (4, 3, 200.0, 1.5, ())
    assert AuditKind.DEPLOYMENT_INFEASIBLE not in {kind for kind, _ in cluster.trail.said}


def told_of(cluster: Cluster, counted: Service) -> CloudStatus:
    """What status says of the first deployment's cloud after a heartbeat."""
    said = cluster.nodes[A].beat().capacity
    cluster.mind.fold(CapacityReceived(said.model_copy(update={"service": (counted,)})), cluster.now)
    found = next(one for one in status(cluster.mind.snapshot, cluster.now).deployments if one.name == ONE).cloud
    assert found is not None
    return found

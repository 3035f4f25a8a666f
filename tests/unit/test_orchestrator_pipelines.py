"""Pipelines as an orchestrator sees them: services placed, kept, moved and steered, from a snapshot and from nothing
else."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from orchestrator.decide import End, Replan, decide
from orchestrator.fold import (
    CapacityReceived,
    DeploymentRemoved,
    DeploymentWritten,
    ManifestKnown,
    NodeWished,
    RolloutAdvanced,
    ServicesStand,
    Snapshot,
    fold,
)
from orchestrator.pipelines import (
    adopted,
    by_service,
    check_names,
    confirmed,
    is_to_be_placed,
    orphans,
    pipelines,
    placed_anew,
    steered,
    wanted,
)
from orchestrator.rollout import Rollout
from orchestrator.services.standing import Standing
from orchestrator.trial import check_drain, check_is_no_service, check_is_same_graph, check_services
from orchestrator.view import status
from orchestrator.weighing import weighable
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity, Service, StepCount, TaskCount
from schemas.deployment import Deployment, NodeWish, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest, ModelKind, TensorSpec
from schemas.pipeline import Input, Pipeline, Step, Task, service_deployment
from schemas.pipeline import Service as Spec
from schemas.plan import Plan, Route
from schemas.slo import Slo
from tests.unit.test_orchestrator_planning import START, A, B, C, heartbeat, later, manifest, world

D = NodeId("d")
LOOK = DeploymentName("look")
EYES, WORDS, GRAPH, DECODER = (Digest(letter * 64) for letter in "4567")
BLOB = BlobRef(digest=Digest("8" * 64), size_bytes=1000)
GFLOP = 10**9


def tensor_model(name: str, flops: int) -> Manifest:
    """One block that takes `x` and gives `y`."""
    x, y = (TensorSpec(name=letter, dtype="float32", shape=("batch", 8)) for letter in "xy")
    return Manifest(
        name=name,
        kind=ModelKind.TENSOR,
        architecture="toy",
        precision="fp32",
        source="test",
        cut="-",
        inputs=(x,),
        outputs=(y,),
        blocks=(Block(index=0, role="whole", graph=BLOB, weights=(), flops_per_token=flops),),
        whole=BLOB,
    )


def graph(pipeline: Pipeline) -> Manifest:
    return tensor_model("look", 0).model_copy(
        update={"kind": ModelKind.PIPELINE, "inputs": (), "outputs": (), "pipeline": pipeline}
    )


def pipeline(rate_per_s: float = 1.0, **more: object) -> Pipeline:
    """Eyes, which are core, then words, which are light."""
    task = Task(
        slo=Slo(deadline_ms=100.0),
        rate_per_s=rate_per_s,
        inputs={"image": Input(datatype="FP32", shape=(1, 8))},
        steps={"eyes": Step(inputs={"x": "request.image"}), "words": Step(inputs={"x": "eyes.y"})},
        outputs={"said": "words.y"},
    )
    services = {"eyes": Spec(model=EYES, kind="core"), "words": Spec(model=WORDS, kind="light", keep_cost=0.1)}
    return Pipeline.model_validate({"services": services, "tasks": {"say": task}, **more})


def deployed(found: Pipeline, *capacities: Capacity) -> Snapshot:
    snapshot = world(*capacities)
    for digest, known in (
        (EYES, tensor_model("eyes", 5 * GFLOP)),
        (WORDS, tensor_model("words", 10 * GFLOP)),
        (GRAPH, graph(found)),
        (DECODER, manifest()),
    ):
        snapshot = fold(snapshot, ManifestKnown(digest, known), START)
    return fold(snapshot, DeploymentWritten(Deployment(name=LOOK, model=GRAPH)), START)


def stands(snapshot: Snapshot, now: datetime = START) -> Snapshot:
    """Once the services are placed."""
    found = pipelines(snapshot)[LOOK]
    return let_stand(snapshot, placed_anew(snapshot, LOOK, found, now), now)


def let_stand(snapshot: Snapshot, standing: Standing, now: datetime = START) -> Snapshot:
    services = wanted(snapshot, LOOK, pipelines(snapshot)[LOOK], standing)
    return fold(snapshot, ServicesStand(LOOK, standing, services), now)


def serves(snapshot: Snapshot) -> Snapshot:
    """Once every service's plan is in force as it is wanted, and the pipeline is conducted at `a`."""
    for name, deployment in snapshot.deployments.items():
        chains = deployment.chains
        if chains is None:
            last = len(snapshot.manifests[deployment.model].blocks) - 1
            chains = ((Stage(node=A, first=0, last=last),),)
        known = snapshot.rollout(name).current
        plan = Plan(
            deployment=name,
            model=deployment.model,
            epoch=1 if known is None else known.epoch + 1,
            block_count=chains[0][-1].last + 1,
            settings=deployment.settings,
            routes=tuple(
                Route(index=i, source=chain[0].node, stages=chain, max_sequences=1) for i, chain in enumerate(chains)
            ),
            reason="a test",
        )
        rollout = Rollout(name, 1, epoch=plan.epoch, current=plan, current_since=START)
        snapshot = fold(snapshot, RolloutAdvanced(rollout), START)
    return snapshot


def nodes_of(snapshot: Snapshot, service: str) -> list[str]:
    chains = snapshot.deployments[service_deployment(LOOK, service)].chains
    assert chains is not None
    return [stage.node for chain in chains for stage in chain]


def asked(snapshot: Snapshot, seconds: float, per_s: float, words_ms: float = 10.0, *alive: NodeId) -> Snapshot:
    """A second at a time: requests come in at `a`, are answered, and the light service is steered."""
    began = snapshot.pipelines[LOOK].at
    known = snapshot.nodes[A].capacity.service
    count = known[0].arrived if known else 0
    for passed in range(1, int(seconds) + 1):
        now = began + timedelta(seconds=passed)
        count += int(per_s)
        took = [("eyes", 5.0, node) for node in nodes_of(snapshot, "eyes")]
        took += [("words", words_ms, node) for node in nodes_of(snapshot, "words")]
        told = Service(
            deployment=LOOK,
            arrived=count,
            tasks=(TaskCount(task="say", arrived=count),),
            steps=tuple(
                StepCount(
                    service=service,
                    node=NodeId(node),
                    answers=count,
                    compute_ms=count * ms,
                    compute_ms_squared=count * ms**2,
                )
                for service, ms, node in took
            ),
        )
        for node in alive or tuple(snapshot.present):
            capacity = snapshot.nodes[node].capacity
            update = {"sequence": capacity.sequence + 1, **({"service": (told,)} if node == A else {})}
            snapshot = fold(snapshot, CapacityReceived(capacity.model_copy(update=update)), now)
        standing = steered(snapshot, LOOK, pipelines(snapshot)[LOOK], now)
        changed = standing.placed != snapshot.pipelines[LOOK].placed
        snapshot = let_stand(snapshot, standing, now)
        if changed:
            snapshot = serves(snapshot)
    return snapshot


def test_core_services_have_an_instance_where_any_one_node_is_lost_and_light_ones_one() -> None:
    snapshot = stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C)))
    assert len(set(nodes_of(snapshot, "eyes"))) == 2
    assert len(nodes_of(snapshot, "words")) == 1
    standing = snapshot.pipelines[LOOK]
    assert standing.why == "the core services were placed"
    assert standing.terms["proven"] == 1.0
    assert by_service(standing.placed).keys() == {"eyes", "words"}


def test_services_are_deployments_that_are_planned_as_they_are_placed() -> None:
    snapshot = stands(deployed(pipeline(), heartbeat(A), heartbeat(B)))
    needed = {one.deployment: one for one in decide(snapshot, START) if isinstance(one, Replan)}
    assert needed.keys() == {LOOK, "look-eyes", "look-words"}
    seen = {one.name: one for one in status(snapshot, START).deployments}
    assert seen[LOOK].state == "preparing"
    assert seen[LOOK].reason is not None
    served = serves(snapshot)
    assert decide(served, START) == ()
    told = {one.name: one for one in status(served, START).deployments}
    assert told[LOOK].state == "serving"
    assert told[LOOK].estimate is None, "what it takes is up to its services"
    assert told[service_deployment(LOOK, "eyes")].estimate is not None


def test_what_is_placed_by_program_is_not_weighed_besides() -> None:
    assert weighable(serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B)))), START) == ()


def test_one_node_cannot_survive_its_loss_and_a_deploy_says_so() -> None:
    found = pipeline()
    snapshot = deployed(found, heartbeat(A))
    models = dict(snapshot.manifests)
    with pytest.raises(ResplitError, match="the loss of a node") as refused:
        check_services(snapshot, snapshot.deployments[LOOK], found, models, START)
    assert refused.value.code is ErrorCode.INFEASIBLE
    calm = pipeline(survives="none")
    check_services(deployed(calm, heartbeat(A)), snapshot.deployments[LOOK], calm, models, START)


def test_a_service_that_fits_nowhere_is_named_and_what_to_do() -> None:
    with pytest.raises(ResplitError, match=r"service 'eyes' needs .* cut it over nodes with `stages`") as refused:
        stands(deployed(pipeline(), heartbeat(A, blocks=0.1), heartbeat(B, blocks=0.1)))
    assert refused.value.code is ErrorCode.MODEL_TOO_LARGE
    snapshot = deployed(pipeline(), heartbeat(A), heartbeat(B))
    sealed = fold(snapshot, DeploymentWritten(Deployment(name=LOOK, model=GRAPH, sealed=True)), START)
    for node in (A, B):
        sealed = fold(sealed, NodeWished(NodeWish(node=node, trusted=False)), START)
    with pytest.raises(ResplitError, match="no node that is here may have service 'eyes'"):
        stands(sealed)


def test_what_runs_is_not_given_up_with_the_rule_that_cannot_be_kept_any_more() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B))))
    alone = later(snapshot, 6, B)
    assert alone.absent == {A}
    assert is_to_be_placed(alone, LOOK, pipelines(alone)[LOOK], alone.ticked_at or START)
    after = stands(alone, alone.ticked_at or START)
    assert nodes_of(after, "eyes") == ["b"]
    assert nodes_of(after, "words") == ["b"]
    assert after.pipelines[LOOK].why.endswith("although another failure would not be survived")


def test_a_lost_replica_is_replaced_and_what_lives_stays() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))))
    lost = NodeId(nodes_of(snapshot, "eyes")[0])
    stays = NodeId(nodes_of(snapshot, "eyes")[1])
    living = [node for node in (A, B, C) if node != lost]
    gone = later(snapshot, 6, *living)
    after = stands(gone, gone.ticked_at or START)
    assert lost not in nodes_of(after, "eyes") + nodes_of(after, "words")
    assert stays in nodes_of(after, "eyes")
    assert len(nodes_of(after, "eyes")) == 2


def test_a_node_that_joins_moves_nothing_that_serves() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B))))
    before = snapshot.pipelines[LOOK].placed
    joined = fold(snapshot, CapacityReceived(heartbeat(C)), START)
    assert is_to_be_placed(joined, LOOK, pipelines(joined)[LOOK], START)
    assert stands(joined).pipelines[LOOK].placed == before


def test_a_drain_moves_services_and_is_refused_where_they_fit_nowhere() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C, blocks=0))))
    check_drain(snapshot, A, START)
    drained = fold(snapshot, NodeWished(NodeWish(node=A, drained=True)), START)
    assert "a" not in nodes_of(stands(drained), "eyes") + nodes_of(stands(drained), "words")
    with pytest.raises(ResplitError, match="the services of 'look' cannot run without node 'b'"):
        check_drain(drained, B, START)


def test_a_new_leader_goes_on_with_what_the_plans_in_force_say() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))))
    heir = deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))
    for rollout in snapshot.rollouts.values():
        heir = fold(heir, RolloutAdvanced(rollout), START)
    found = adopted(heir, LOOK, pipelines(heir)[LOOK], START)
    assert found is not None
    assert found.placed == snapshot.pipelines[LOOK].placed
    heir = let_stand(heir, found)
    sure = confirmed(heir, LOOK, pipelines(heir)[LOOK])
    assert sure is not None
    after = let_stand(heir, sure)
    assert not is_to_be_placed(after, LOOK, pipelines(after)[LOOK], START)
    gone = later(heir, 6, B, C)
    assert confirmed(gone, LOOK, pipelines(gone)[LOOK]) is None or "a" not in nodes_of(gone, "eyes")
    assert decide(after, START) == ()


def test_services_whose_pipeline_is_not_known_yet_are_left_alone() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B))))
    blind = world(heartbeat(A), heartbeat(B))
    blind = fold(blind, DeploymentWritten(Deployment(name=LOOK, model=GRAPH)), START)
    for rollout in snapshot.rollouts.values():
        blind = fold(blind, RolloutAdvanced(rollout), START)
    assert pipelines(blind) == {}
    assert [one for one in decide(blind, START) if isinstance(one, End)] == []


def test_a_leader_that_lacks_the_model_of_one_service_ends_none() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B))))
    short = world(heartbeat(A), heartbeat(B))
    short = fold(short, ManifestKnown(GRAPH, graph(pipeline())), START)
    short = fold(short, ManifestKnown(EYES, tensor_model("eyes", GFLOP)), START)
    short = fold(short, DeploymentWritten(Deployment(name=LOOK, model=GRAPH)), START)
    for rollout in snapshot.rollouts.values():
        short = fold(short, RolloutAdvanced(rollout), START)
    assert [one for one in decide(short, START) if isinstance(one, End)] == []


def test_what_services_are_held_to_moves_them_and_nothing_else_is_deployed_under_the_name() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))))
    snapshot = fold(snapshot, NodeWished(NodeWish(node=A, trusted=False)), START)
    snapshot = stands(snapshot)
    assert not is_to_be_placed(snapshot, LOOK, pipelines(snapshot)[LOOK], START)
    sealed = Deployment(name=LOOK, model=GRAPH, sealed=True)
    check_is_same_graph(snapshot, sealed, snapshot.manifests)
    closed = fold(snapshot, DeploymentWritten(sealed), START)
    assert is_to_be_placed(closed, LOOK, pipelines(closed)[LOOK], START)
    assert "a" not in nodes_of(stands(closed), "eyes") + nodes_of(stands(closed), "words")
    with pytest.raises(ResplitError, match="deploy this one under another name"):
        check_is_same_graph(snapshot, Deployment(name=LOOK, model=DECODER), snapshot.manifests)


def test_a_node_that_refuses_a_service_is_left_for_another() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))))
    [node] = nodes_of(snapshot, "words")
    called = service_deployment(LOOK, "words")
    refused = replace(snapshot.rollout(called), refused={NodeId(node): START}, failures=1)
    snapshot = fold(snapshot, RolloutAdvanced(refused), START)
    assert is_to_be_placed(snapshot, LOOK, pipelines(snapshot)[LOOK], START)
    assert nodes_of(stands(snapshot), "words") != [node]


def test_services_end_with_their_pipeline_once_it_has_answered_its_last() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B))))
    removed = fold(snapshot, DeploymentRemoved(LOOK), START)
    assert orphans(removed) == ()
    over = fold(removed, RolloutAdvanced(Rollout(LOOK, 1, epoch=1)), START)
    assert set(orphans(over)) == {"look-eyes", "look-words"}


def test_a_service_cannot_take_anothers_name_nor_be_changed_by_itself() -> None:
    snapshot = stands(deployed(pipeline(), heartbeat(A), heartbeat(B)))
    with pytest.raises(ResplitError, match="is service 'eyes' of pipeline 'look'"):
        check_is_no_service(snapshot, DeploymentName("look-eyes"))
    check_is_no_service(snapshot, LOOK)
    taken = fold(
        deployed(pipeline(), heartbeat(A)),
        DeploymentWritten(Deployment(name=DeploymentName("look-eyes"), model=DECODER)),
        START,
    )
    with pytest.raises(ResplitError, match="there is a deployment 'look-eyes'"):
        check_names(taken, LOOK, pipeline())
    with pytest.raises(ResplitError, match="longer than 63"):
        check_names(taken, DeploymentName("l" * 60), pipeline())


def test_light_services_follow_what_arrives_and_are_given_back() -> None:
    four = (heartbeat(A), heartbeat(B), heartbeat(C), heartbeat(D))
    calm = serves(stands(deployed(pipeline(), *four)))
    assert len(nodes_of(asked(calm, 20, per_s=10), "words")) == 1
    busy = asked(calm, 20, per_s=150)
    assert len(nodes_of(busy, "words")) >= 2
    assert nodes_of(busy, "eyes") == nodes_of(calm, "eyes")
    assert busy.pipelines[LOOK].terms["say.per_s"] > 50
    assert busy.pipelines[LOOK].why.startswith("added words on")
    quiet = asked(busy, 60, per_s=5)
    assert len(nodes_of(quiet, "words")) == 1


def test_while_a_plan_is_under_way_nothing_else_is_changed() -> None:
    four = (heartbeat(A), heartbeat(B), heartbeat(C), heartbeat(D))
    placed = serves(stands(deployed(pipeline(), *four)))
    placed = fold(placed, RolloutAdvanced(Rollout(service_deployment(LOOK, "words"), 1)), START)  # no plan in force
    busy = asked(placed, 20, per_s=150)
    assert busy.pipelines[LOOK].placed == placed.pipelines[LOOK].placed
    assert busy.pipelines[LOOK].rates.tasks["say"] > placed.pipelines[LOOK].rates.tasks["say"]


def test_what_is_late_more_often_than_was_predicted_is_taken_for_slower() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))))
    for second in range(1, 11):
        now = START + timedelta(seconds=second)
        told = TaskCount(task="say", arrived=20 * second, missed=10 * second)
        capacity = snapshot.nodes[A].capacity
        update = {
            "sequence": second,
            "service": (Service(deployment=LOOK, arrived=20 * second, tasks=(told,)),),
        }
        snapshot = fold(snapshot, CapacityReceived(capacity.model_copy(update=update)), now)
        snapshot = let_stand(snapshot, steered(snapshot, LOOK, pipelines(snapshot)[LOOK], now), now)
    standing = snapshot.pipelines[LOOK]
    assert standing.strain > 2.0
    assert standing.debts["say"] == pytest.approx(90 - 0.05 * 180)  # what came before the first look counts for nothing
    calm = asked(serves(snapshot), 120, per_s=5)
    assert calm.pipelines[LOOK].strain == 1.0


def test_what_was_counted_before_the_first_look_did_not_come_just_now() -> None:
    snapshot = serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C))))
    now = START + timedelta(seconds=1)
    long = Service(deployment=LOOK, arrived=10**6, tasks=(TaskCount(task="say", arrived=10**6, missed=10**5),))
    beat = snapshot.nodes[A].capacity.model_copy(update={"sequence": 1, "service": (long,)})
    after = steered(fold(snapshot, CapacityReceived(beat), now), LOOK, pipelines(snapshot)[LOOK], now)
    assert after.rates.tasks["say"] < 1.0
    assert after.debts["say"] == 0.0


def test_what_others_say_of_a_pipeline_counts_for_nothing() -> None:
    snapshot = asked(serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B), heartbeat(C)))), 3, per_s=5)
    now = snapshot.pipelines[LOOK].at + timedelta(seconds=1)
    slow = StepCount(service="words", node=A, answers=1000, compute_ms=1e9, compute_ms_squared=1e15)
    odd = StepCount(service="nose", node=A, answers=1000, compute_ms=1e9, compute_ms_squared=1e15)
    flood = (TaskCount(task="say", arrived=10**6, missed=10**6), TaskCount(task="sing", arrived=10**6))
    for node, steps in ((C, (slow,)), (A, (odd,))):
        told = Service(deployment=LOOK, tasks=flood if node == C else flood[1:], steps=steps)
        capacity = snapshot.nodes[node].capacity
        update = {"sequence": capacity.sequence + 1, "service": (told,)}
        snapshot = fold(snapshot, CapacityReceived(capacity.model_copy(update=update)), now)
    before, after = snapshot.pipelines[LOOK], steered(snapshot, LOOK, pipelines(snapshot)[LOOK], now)
    assert after.rates.tasks["say"] <= before.rates.tasks["say"]
    assert (after.debts, after.strain) == (before.debts, before.strain)
    assert after.seen.times == before.seen.times


def test_what_is_owed_and_known_outlasts_a_change_of_nodes() -> None:
    snapshot = asked(serves(stands(deployed(pipeline(), heartbeat(A), heartbeat(B)))), 5, per_s=20)
    owing = replace(snapshot.pipelines[LOOK], debts={"say": 7.0}, strain=2.0)
    joined = fold(let_stand(snapshot, owing), CapacityReceived(heartbeat(C)), START)
    after = stands(joined).pipelines[LOOK]
    assert (after.debts, after.strain, after.seen) == (owing.debts, owing.strain, owing.seen)
    assert after.basis is not None
    assert after.basis.nodes == {A, B, C}


def test_only_trusted_nodes_have_services_of_what_is_sealed() -> None:
    found = pipeline(survives="none")
    snapshot = deployed(found, heartbeat(A), heartbeat(B))
    snapshot = fold(snapshot, DeploymentWritten(Deployment(name=LOOK, model=GRAPH, sealed=True)), START)
    snapshot = fold(snapshot, NodeWished(NodeWish(node=A, trusted=False)), START)
    after = stands(snapshot)
    assert set(nodes_of(after, "eyes") + nodes_of(after, "words")) == {"b"}
    assert after.deployments[service_deployment(LOOK, "eyes")].sealed


def test_a_service_that_is_cut_is_left_to_the_planner() -> None:
    task = Task(
        slo=Slo(deadline_ms=1000.0),
        inputs={"question": Input(datatype="BYTES", shape=(1,))},
        steps={"mind": Step(prompt="request.question")},
        outputs={"text": "mind.text"},
    )
    found = Pipeline(services={"mind": Spec(model=DECODER, kind="core", stages=2)}, tasks={"ask": task})
    snapshot = stands(deployed(found, heartbeat(A), heartbeat(B)))
    mind = snapshot.deployments[service_deployment(LOOK, "mind")]
    assert mind.placement is None
    assert (mind.stages, mind.routes) == (2, 1)
    assert mind.settings.context_tokens == 1024  # the model's own, where nobody says

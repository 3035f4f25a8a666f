"""Manifests, plans and plan events that contradict themselves cannot be made."""

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Settings, Stage
from schemas.manifest import BlobRef, Block, KvCache, Manifest, ModelKind, TensorSpec, TextSpec
from schemas.plan import Plan, PlanEvent, PlanPhase, Route

BLOB = BlobRef(digest=Digest("a" * 64), size_bytes=10)
WEIGHT = BlobRef(digest=Digest("b" * 64), size_bytes=100)
TOKENIZER = BlobRef(digest=Digest("c" * 64), size_bytes=7)
EDGES = tuple(TensorSpec(name=f"h{i}", dtype="float32", shape=("batch", 8)) for i in range(2))
X = TensorSpec(name="x", dtype="float32", shape=("batch", 8))


def block(index: int, **changes: Any) -> Block:
    made = Block(index=index, role="segment", graph=BLOB, weights=(WEIGHT,), flops_per_token=1)
    ends = {"input": EDGES[index - 1] if index else None, "output": EDGES[index] if index < 2 else None}
    return made.model_copy(update=ends | changes)


def manifest(*blocks: Block, kind: ModelKind = ModelKind.TENSOR, text: TextSpec | None = None) -> Manifest:
    return Manifest(
        name="m",
        kind=kind,
        architecture="a",
        precision="fp32",
        source="a test",
        cut="in three",
        inputs=(X,),
        outputs=(X,),
        blocks=blocks or (block(0), block(1), block(2)),
        whole=BLOB,
        text=text,
    )


def test_a_file_that_blocks_share_is_counted_once() -> None:
    text = TextSpec(tokenizer=TOKENIZER, vocab_size=5, context_length=5)
    assert manifest(text=text).blobs == {BLOB.digest: 10, WEIGHT.digest: 100, TOKENIZER.digest: 7}
    assert manifest(text=text).stored_bytes == 117


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ((block(1), block(2)), "carries index"),
        ((block(0), block(1)), "open end"),
        ((block(0), block(1, input=None), block(2)), "open end"),
        ((block(0), block(1, input=EDGES[1]), block(2)), "does not start where"),
    ],
)
def test_blocks_that_form_no_chain_make_no_manifest(blocks: tuple[Block, ...], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        manifest(*blocks)


def test_a_decoder_needs_a_tokenizer() -> None:
    with pytest.raises(ValidationError, match="tokenizer"):
        manifest(kind=ModelKind.DECODER)


def test_a_token_takes_a_key_and_a_value_in_the_cache() -> None:
    names = {"past_key": "a", "past_value": "b", "present_key": "c", "present_value": "d"}
    cache = KvCache(layout="shared", heads=2, head_dim=16, dtype="float16", **names)
    assert cache.bytes_per_token == 2 * 2 * 16 * 2
    assert block(1, kv=(cache, cache)).kv_bytes_per_token == 256


def stage(node: str, first: int, last: int) -> Stage:
    return Stage(node=NodeId(node), first=first, last=last)


def route(*stages: Stage, index: int = 0, sequences: int = 4) -> Route:
    return Route(index=index, source=stages[0].node, stages=stages, max_sequences=sequences)


def plan(epoch: int = 1, *routes: Route, deployment: str = "adder", **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "deployment": DeploymentName(deployment),
        "model": Digest("d" * 64),
        "epoch": epoch,
        "block_count": 6,
        "settings": Settings(max_sequences=4),
        "routes": routes or (route(stage("n0", 0, 1), stage("n1", 2, 4), stage("n0", 5, 5)),),
        "reason": "a test",
    }
    return Plan(**(fields | changes))


def test_a_node_may_have_two_stages_and_is_named_once() -> None:
    made = plan()
    assert made.nodes == ("n0", "n1")
    assert (made.blocks_on("n0"), made.blocks_on("n1"), made.blocks_on("n2")) == ((0, 1, 5), (2, 3, 4), ())


def test_the_digest_is_of_everything_the_plan_says() -> None:
    assert plan().digest == plan().digest
    assert len({plan().digest, plan(2).digest, plan(reason="another").digest}) == 3


def test_a_stage_cannot_run_backwards() -> None:
    with pytest.raises(ValidationError, match="cannot run"):
        stage("n0", 3, 2)


@pytest.mark.parametrize("stages", [(stage("n0", 1, 5),), (stage("n0", 0, 1), stage("n1", 3, 5))])
def test_a_route_has_no_gap(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(ValidationError, match="starts at block"):
        route(*stages)


@pytest.mark.parametrize(
    ("routes", "why"),
    [
        ((route(stage("n0", 0, 4)),), "ends at block"),
        ((route(stage("n0", 0, 6)),), "ends at block"),
        ((route(stage("n0", 0, 5), index=1),), "carries index"),
        ((route(stage("n0", 0, 5)), route(stage("n1", 0, 5), index=1)), "more sequences"),
    ],
)
def test_routes_that_do_not_cover_the_model_make_no_plan(routes: tuple[Route, ...], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        plan(1, *routes)


def event(**plans: Any) -> PlanEvent:
    return PlanEvent(
        deployment=DeploymentName("adder"),
        term=1,
        revision=1,
        phase=PlanPhase.PREPARE,
        reason="a test",
        issued_at=datetime(2026, 1, 1, tzinfo=UTC),
        **plans,
    )


def test_an_event_names_every_plan_to_keep_loaded() -> None:
    told = event(current=plan(2), candidate=plan(3), draining=(plan(1),))
    assert [p.epoch for p in told.plans] == [1, 2, 3]


@pytest.mark.parametrize(
    ("plans", "why"),
    [
        ({"current": plan(1), "draining": (plan(1),)}, "one epoch"),
        ({"current": plan(1, deployment="other")}, "another deployment"),
        ({"current": plan(2), "candidate": plan(1)}, "does not follow"),
    ],
)
def test_plans_that_do_not_belong_together_make_no_event(plans: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        event(**plans)


def test_a_time_without_a_zone_is_no_time() -> None:
    with pytest.raises(ValidationError, match="timezone"):
        PlanEvent.model_validate(event().model_dump() | {"issued_at": datetime(2026, 1, 1)})

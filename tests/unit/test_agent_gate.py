"""Which frames count from whom: the node before on the route, an ingress, or nobody."""

from datetime import UTC, datetime

import pytest

from agent.gate import Gate, may_send
from schemas.base import NodeId
from schemas.deployment import Settings, Stage
from schemas.frame import Activation, Adopt, Adopted, Cache, Close, Failure, Fetch, Frame, Item, Result, Reuse, Sampling
from schemas.framing import pack
from schemas.plan import PlanEvent, PlanPhase
from schemas.section import PlanSection, SeenPlan, section_of
from tests.nodes import plan_of

A, B, C, OTHER, STRANGER = NODES = tuple(NodeId(name) for name in ("a", "b", "c", "other", "stranger"))
INGRESSES = (A, OTHER)
"""The source, and one that drives over its route as well."""
SAMPLING = Sampling()
PLAN = plan_of(3, [Stage(node=n, first=2 * i, last=2 * i + 1) for i, n in enumerate((A, B, C))], Settings(), 6)
D = PLAN.deployment


def as_seen_by(node: NodeId) -> SeenPlan:
    event = PlanEvent(
        deployment=D,
        term=1,
        revision=1,
        phase=PlanPhase.COMMIT,
        reason="a test",
        issued_at=datetime(2026, 1, 1, tzinfo=UTC),
        current=PLAN,
    )
    section = section_of(event, node)
    assert section is not None
    assert section.current is not None
    return section.current


def activation(stage: int, ingress: NodeId = A) -> Activation:
    return Activation(
        D, 3, 0, stage, "decode", (Item(1, 4, 7, 1, wants_token=True, index=3, capacity=128),), {}, ingress
    )


def reuse(stage: int, ingress: NodeId = A) -> Reuse:
    return Reuse(D, 3, 0, stage, ingress, 1, 2, 16, 128, SAMPLING)


MAY: list[tuple[NodeId, Frame, set[NodeId]]] = [
    (A, activation(0), {A}),
    (A, activation(0, OTHER), {OTHER}),
    (A, activation(0, STRANGER), set()),
    (B, activation(1), {A}),
    (B, activation(1, STRANGER), {A}),
    (C, activation(2), {B}),
    (B, activation(0), {A}),
    (B, activation(7), set()),
    (A, reuse(0, OTHER), {OTHER}),
    (C, reuse(2), {B}),
    (A, Close(D, 3, 0, 0, (1,)), {A, OTHER}),
    (C, Close(D, 3, 0, 2, (1,)), {B, A, OTHER}),
    (A, Result(D, 3, 0, (), (), {}, A, ()), {C}),
    (A, Failure(D, 3, 0, (), A, "stage_failed", "x"), {A, B, C}),
    (B, Adopt(D, 2, 3, 0, OTHER, 1, 16, 128, SAMPLING, (), final=False), {OTHER}),
    (B, Adopt(D, 2, 3, 0, STRANGER, 1, 16, 128, SAMPLING, (), final=False), set()),
    (A, Adopted(D, 3, 0, A, B, 1, 16, False, 0), {B}),
    (A, Fetch(D, 3, 4, OTHER, 1, 0, 1, 0, 16), {OTHER}),
    (A, Cache(D, 3, B, 1, 0, 1, 0, 16, {}), {B}),
]


@pytest.mark.parametrize(("to", "frame", "allowed"), MAY)
def test_a_frame_counts_from_who_would_send_it_and_from_nobody_else(
    to: NodeId, frame: Frame, allowed: set[NodeId]
) -> None:
    assert isinstance(as_seen_by(B), PlanSection), "a host sees a part"
    assert {node for node in NODES if may_send(as_seen_by(to), INGRESSES, node, frame)} == allowed


def test_of_a_plan_that_is_not_known_only_ingresses_say_anything() -> None:
    for frame in (activation(1), Result(D, 9, 0, (), (), {}, A, ()), Failure(D, 9, 0, (), A, "stage_failed", "x")):
        assert not [node for node in NODES if may_send(None, INGRESSES, node, frame)]
    assert may_send(None, INGRESSES, A, activation(0))
    assert not may_send(None, (), A, activation(0))


def test_what_is_dropped_costs_nothing_that_comes_behind_it(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[Frame] = []
    gate = Gate(lambda _, __: as_seen_by(B), lambda _: INGRESSES, taken.append)

    def arrives(sender: NodeId, frame: Frame) -> None:
        gate.arrived(sender, memoryview(b"".join(bytes(piece) for piece in pack(frame))))

    arrives(STRANGER, activation(1))
    gate.arrived(A, memoryview(b"\xff" * 40))
    arrives(A, activation(1))
    assert taken == [activation(1)]
    assert "dropped from stranger: Activation of d, epoch 3" in caplog.text

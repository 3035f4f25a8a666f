"""What nodes are told of plan events: no node or block that they have no business with, and together everything."""

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.base import DeploymentName, Digest, NodeId
from schemas.codec import decode, encode
from schemas.deployment import Settings, Stage
from schemas.plan import Place, Plan, PlanEvent, PlanPhase, Route
from schemas.sealed import NodeKeys, Wrap
from schemas.section import EventSection, PlanSection, RouteSection, nothing_of, readers, section_of

NODES = [NodeId(f"node-{letter}") for letter in "abcdefgh"]
"""Names that are found in bytes only where they are meant."""
MODEL = Digest("d" * 64)
EVERYBODY = f"a sentence that names {', '.join(NODES)}"


@st.composite
def routes(draw: st.DrawFn, index: int, block_count: int) -> Route:
    cuts = sorted(draw(st.sets(st.integers(1, block_count - 1), max_size=5))) if block_count > 1 else []
    firsts, lasts = [0, *cuts], [*(cut - 1 for cut in cuts), block_count - 1]
    stages = tuple(
        Stage(node=draw(st.sampled_from(NODES)), first=a, last=b) for a, b in zip(firsts, lasts, strict=True)
    )
    source = draw(st.sampled_from([stages[0].node, *NODES]))
    return Route(index=index, source=source, stages=stages, max_sequences=1)


@st.composite
def plans(draw: st.DrawFn, epoch: int) -> Plan:
    block_count = draw(st.integers(1, 9))
    return Plan(
        deployment=DeploymentName("chat"),
        model=MODEL,
        epoch=epoch,
        block_count=block_count,
        settings=Settings(),
        routes=tuple(draw(routes(index, block_count)) for index in range(draw(st.integers(1, 3)))),
        reason=EVERYBODY,
    )


@st.composite
def events(draw: st.DrawFn) -> PlanEvent:
    here = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    draining, current, candidate = (draw(plans(epoch)) if there else None for epoch, there in enumerate(here, 1))
    some_nodes = st.sets(st.sampled_from(NODES), max_size=3).map(lambda nodes: tuple(sorted(nodes)))
    keys = tuple(
        NodeKeys(model=MODEL, node=node, wraps=(Wrap.of(0, node.encode().ljust(80)),)) for node in draw(some_nodes)
    )
    return PlanEvent(
        deployment=DeploymentName("chat"),
        term=2,
        revision=7,
        phase=PlanPhase.COMMIT,
        reason=EVERYBODY,
        issued_at=datetime(2026, 1, 1, tzinfo=UTC),
        current=current,
        candidate=candidate,
        draining=() if draining is None else (draining,),
        lost=draw(some_nodes),
        answering=draw(some_nodes),
        keys=keys or None,
    )


def near(plan: Plan, node: NodeId) -> dict[Place, Stage]:
    """The stages of `node` and those next to them, found the long way."""
    found = {}
    for route in plan.routes:
        for i, stage in enumerate(route.stages):
            if node in [neighbour.node for neighbour in route.stages[max(0, i - 1) : i + 2]]:
                found[route.index, i] = stage
    return found


def by_epoch(event: PlanEvent | EventSection | None) -> dict[int, Plan | PlanSection]:
    return {} if event is None else {plan.epoch: plan for plan in event.plans}


@given(event=events())
def test_a_host_is_told_of_no_node_and_no_block_but_its_own_and_the_next(event: PlanEvent) -> None:
    for node in NODES:
        section = section_of(event, node)
        if node in event.ingresses or section is None:
            continue
        coming = () if event.candidate is None else event.candidate.routes
        known = {node, *event.ingresses, *(route.source for route in coming)}
        for plan in event.plans:
            seen = by_epoch(section).get(plan.epoch)
            own = [route for route in plan.routes if node in route.nodes]
            if any(route.source == node for route in plan.routes):
                assert seen == plan
                known.update(plan.nodes)
                continue
            assert (seen is None) == (not own)
            known.update(route.source for route in own)
            known.update(stage.node for stage in near(plan, node).values())
            if seen is not None:
                assert dict(seen.placed) == near(plan, node)
        said = encode(section).decode()
        whole = any(isinstance(plan, Plan) for plan in section.plans)
        assert whole or [other for other in NODES if other in said and other not in known] == []
        assert set(section.lost) <= known


@given(event=events())
def test_all_sections_together_are_the_plan_and_each_is_enough_to_serve_it(event: PlanEvent) -> None:
    told = {node: by_epoch(section_of(event, node)) for node in NODES}
    for plan in event.plans:
        together: dict[Place, Stage] = {}
        for node, plans in told.items():
            seen = plans.get(plan.epoch)
            assert (seen is None) <= (node not in plan.nodes)
            if seen is None:
                continue
            assert (seen.digest, seen.family, seen.model) == (plan.digest, plan.family, plan.model)
            assert seen.blocks_on(node) == plan.blocks_on(node)
            assert (node in seen.nodes) == (node in plan.nodes)
            together |= follows(seen.placed, plan, node)
        assert together == dict(plan.placed)


def follows(placed: Mapping[Place, Stage], plan: Plan, node: NodeId) -> dict[Place, Stage]:
    """The stages of `node`; the one behind each is seen."""
    own = {place: stage for place, stage in placed.items() if stage.node == node}
    for route, i in own:
        after = plan.placed.get((route, i + 1))
        assert placed.get((route, i + 1)) == after
    return own


@given(event=events())
def test_who_answers_requests_sees_every_plan_and_hears_of_every_loss(event: PlanEvent) -> None:
    for node in event.ingresses:
        section = section_of(event, NodeId(node))
        assert by_epoch(section) == by_epoch(event)
        assert section is None or section.lost == event.lost


@given(event=events())
def test_keys_are_for_their_node_and_a_section_travels_as_it_is(event: PlanEvent) -> None:
    assert readers(event) == tuple(node for node in NODES if section_of(event, node) is not None)
    for node in readers(event):
        section = section_of(event, node)
        assert section is not None
        assert {keys.node for keys in section.keys} <= {node}
        assert len(section.keys) == sum(keys.node == node for keys in event.keys or ())
        assert decode(EventSection, encode(section), "section") == section
    assert nothing_of(event).plans == ()


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ({1: (3, 4), 2: (6, 7)}, "stage 2 cannot start at block 6"),
        ({1: (3, 4), 2: (4, 5)}, "stage 2 cannot start at block 4"),
        ({2: (3, 4), 1: (5, 6)}, "stage 1 cannot start"),
        ({3: (2, 4)}, "stage 3 cannot start at block 2"),
        ({0: (1, 4)}, "stage 0 cannot start at block 1"),
        ({0: (0, 1), 2: (2, 4)}, "stage 2 cannot start at block 2"),
        ({}, "at least 1 item"),
    ],
)
def test_no_route_shows_stages_that_cannot_be_of_one(stages: dict[int, tuple[int, int]], why: str) -> None:
    """A node judges its neighbours by the blocks that they are said to hold: those follow on its own."""
    shown = {number: Stage(node=NODES[0], first=first, last=last) for number, (first, last) in stages.items()}
    with pytest.raises(ValidationError, match=why):
        RouteSection(index=0, source=NODES[1], stages=shown)

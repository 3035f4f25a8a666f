"""What an answer says of itself."""

from agent.usage import Meter
from schemas.base import NodeId
from schemas.deployment import Stage
from schemas.frame import StageTime
from schemas.plan import Route

ROUTE = Route(index=0, source="n0", stages=(Stage(node=NodeId("n0"), first=0, last=1),), max_sequences=1)


def metered() -> Meter:
    meter = Meter(arrived=0.0, started=0.0)
    meter.runs_on(1, ROUTE)
    return meter


def test_an_undisturbed_answer_says_nothing_of_recovery() -> None:
    assert metered().usage(1, 1, 1.0).recovered is None


def test_what_was_once_only_equivalent_is_never_called_identical_again() -> None:
    meter = metered()
    meter.computed_anew(exactly=True)
    assert meter.usage(1, 1, 1.0).recovered == "identical"
    meter.computed_anew(exactly=False)
    meter.computed_anew(exactly=True)
    assert meter.usage(1, 1, 1.0).recovered == "equivalent"


def test_a_call_is_charged_to_the_nodes_of_the_route_that_it_came_back_over() -> None:
    meter = metered()
    short = Route(index=1, source="n0", stages=(Stage(node=NodeId("n2"), first=0, last=1),), max_sequences=1)
    cut = (Stage(node=NodeId("n0"), first=0, last=0), Stage(node=NodeId("n1"), first=1, last=1))
    long = Route(index=2, source="n0", stages=cut, max_sequences=1)
    meter.runs_on(1, long)
    meter.runs_on(1, short)
    meter.add(long, [StageTime(stage=1, compute_us=1000, queue_us=0)], 0.01)
    assert {stage.node: stage.compute_ms for stage in meter.usage(1, 1, 1.0).stages if stage.calls} == {"n1": 1.0}


def test_what_found_no_slot_has_not_begun_and_what_ran_has() -> None:
    meter = metered()
    meter.bounced()
    meter.runs_on(1, ROUTE)
    assert (meter.started, meter.steady) == (None, True)
    meter.started = 1.0
    meter.add(ROUTE, [], 0.01)
    meter.bounced()
    assert meter.started == 1.0

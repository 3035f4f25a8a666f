"""What an answer says of itself."""

from agent.usage import Meter
from schemas.base import NodeId
from schemas.deployment import Stage
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

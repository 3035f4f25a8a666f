"""What a run under a fault is said to have been."""

from benchmarks.faults.__main__ import verdict
from benchmarks.faults.load import Asked, Question
from benchmarks.faults.measure import Seen, loss, quantile, summed_up
from resplit.replies import RequestError

QUESTION = Question("1+1=", None, (5, 6, 7, 8))


def asked(arrivals: list[float], ids: list[int], ended: float | None, error: str | None = None) -> Asked:
    failure = None if error is None else RequestError(error, "it broke")
    return Asked("r", QUESTION, 0.0, arrivals, ids, ended, failure)


def test_only_an_accepted_request_can_be_lost() -> None:
    right = asked([1, 2, 3, 4], [5, 6, 7, 8], 4.0)
    assert loss(right, {"r"}) is None
    assert loss(asked([], [], 1.0, "unknown_deployment"), set()) is None
    assert loss(asked([], [], 1.0, "timeout"), {"r"}) == "timeout after 0 tokens: it broke"
    assert loss(asked([1], [5], 9.0, "timeout"), set()) == "timeout after 1 tokens: it broke"
    assert loss(asked([1, 2], [5, 9], 2.0), {"r"}) == "a wrong token among the first 2"
    assert loss(asked([1, 2], [5, 6], 2.0), {"r"}) == "ended after 2 tokens"
    assert loss(asked([1, 2], [5, 6], None), {"r"}) == "no end after 2 tokens"


def test_tokens_resume_at_the_end_of_the_longest_wait_of_whoever_waited_last() -> None:
    first = asked([1.0, 2.0, 2.6, 5.0], [5, 6, 7, 8], 5.0)  # a token was under way at the fault
    second = asked([1.5, 2.0, 4.0, 4.5], [5, 6, 7, 8], 4.5)
    run = summed_up([first, second], {"r"}, Seen(2.5, (first, second), 5.0))
    assert (run.resume_s, run.gap_s, run.tokens, run.lost, run.refused) == (2.5, 2.4, 2, (), 0)
    assert run.median_gap_s == 0.75


def test_a_stream_that_failed_waited_until_it_did() -> None:
    one = asked([1.0, 2.0], [5, 6], 22.0, "timeout")
    run = summed_up([one], {"r"}, Seen(2.5, (one,), 47.0))
    assert (run.resume_s, run.lost) == (19.5, ("timeout after 2 tokens: it broke",))


def test_a_bound_is_met_if_its_ninety_ninth_percentile_is_and_nothing_was_lost() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert verdict([-0.5] * 99 + [0.25], [], []) == "met"
    assert verdict([-0.5, 0.25], [], []) == "missed: late by 0.25 s, 1 of 2 runs"
    assert verdict([-0.5], ["timeout"], ["two tokens"]) == "missed: 1 lost; 1 broken"
    assert verdict([], [], []) == "nothing lost"

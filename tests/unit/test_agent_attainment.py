"""Which requests count against a deployment's error budget."""

from agent.attainment import Attainment
from schemas.errors import ErrorCode
from schemas.request import Usage
from schemas.slo import BEST_EFFORT, Slo

PROMISED = Slo(ttft_ms=100, tpot_ms=10, deadline_ms=1000)


def usage(ttft_ms: float | None, tpot_ms: float | None, total_ms: float) -> Usage:
    return Usage(
        prompt_tokens=1,
        completion_tokens=2,
        total_tokens=3,
        queued_ms=0,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        total_ms=total_ms,
        network_ms=0,
        epoch=1,
        route=0,
        stages=(),
    )


def counted(promised: Slo | None, own: Slo, *took: Usage) -> tuple[int, int]:
    found = Attainment()
    for one in took:
        found.ended(promised, own, one)
    return found.met, found.missed


def test_a_request_meets_its_class_if_it_meets_every_target() -> None:
    took = usage(90, 9, 900), usage(101, 9, 900), usage(90, 11, 900), usage(90, 9, 1001)
    assert counted(PROMISED, PROMISED, *took) == (1, 3)


def test_one_token_has_no_time_per_token_to_miss_and_an_answer_in_one_piece_comes_first_when_it_comes() -> None:
    assert counted(PROMISED, PROMISED, usage(90, None, 90)) == (1, 0)
    assert counted(PROMISED, PROMISED, usage(None, None, 101)) == (0, 1)


def test_where_nothing_is_promised_nothing_is_counted() -> None:
    for promised in (None, Slo(priority=3)):
        assert counted(promised, Slo(ttft_ms=1), usage(90, 9, 900)) == (0, 0)


def test_who_asks_for_the_impossible_burns_nobodys_budget_and_who_asks_for_less_gets_that() -> None:
    assert counted(PROMISED, Slo(ttft_ms=1, tpot_ms=1, deadline_ms=1), usage(90, 9, 900)) == (1, 0)
    assert counted(PROMISED, Slo(ttft_ms=5000, tpot_ms=10, deadline_ms=9000), usage(4000, 9, 8000)) == (1, 0)


def test_errors_count_unless_they_are_the_clients_own() -> None:
    found = Attainment()
    found.failed(PROMISED, PROMISED, ErrorCode.CANCELLED)
    found.failed(PROMISED, Slo(deadline_ms=5), ErrorCode.DEADLINE_EXCEEDED)
    found.refused(PROMISED, Slo(deadline_ms=5), ErrorCode.DEADLINE_UNATTAINABLE)
    found.refused(PROMISED, PROMISED, ErrorCode.TOKEN_OUT_OF_RANGE)
    found.refused(None, BEST_EFFORT, ErrorCode.OVERLOADED)
    assert (found.met, found.missed) == (0, 0)
    found.failed(PROMISED, PROMISED, ErrorCode.DEADLINE_EXCEEDED)
    found.failed(PROMISED, PROMISED, ErrorCode.NODE_LOST)
    found.refused(PROMISED, PROMISED, ErrorCode.DEADLINE_UNATTAINABLE)
    found.refused(PROMISED, PROMISED, ErrorCode.OVERLOADED)
    assert (found.met, found.missed) == (0, 4)

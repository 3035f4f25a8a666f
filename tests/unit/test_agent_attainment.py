"""What of requests is counted: how many come and how large they are, and which burn a deployment's error budget."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from agent.attainment import Attainment, services
from agent.generation import Generation
from agent.replies import ReplyTo
from agent.usage import Meter
from schemas.base import DeploymentName, Digest, RequestId
from schemas.errors import ErrorCode
from schemas.request import TextRequest, Usage
from schemas.slo import BEST_EFFORT, Slo
from simulator.ingress import SILENT

PROMISED = Slo(ttft_ms=100, tpot_ms=10, deadline_ms=1000)
CHAT = DeploymentName("chat")


def request(own: Slo = PROMISED, prompt: int = 3, max_tokens: int = 8) -> Generation:
    """One that arrived at 0."""
    asked = TextRequest(token_ids=tuple(range(prompt)), max_tokens=max_tokens)
    nowhere = cast(ReplyTo, None)
    return Generation(
        RequestId("r"),
        asked,
        nowhere,
        Digest("1" * 64),
        tuple(range(prompt)),
        max_tokens,
        frozenset(),
        0,
        Meter(0.0),
        SILENT,
        None,
        slo=own,
    )


def usage(ttft_ms: float | None, tpot_ms: float | None, total_ms: float, **more: Any) -> Usage:
    return Usage(
        **{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, **more},
        queued_ms=0,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        total_ms=total_ms,
        network_ms=0,
        epoch=1,
        route=0,
        stages=(),
    )


def outcome(found: Attainment) -> tuple[int, int]:
    return found.counts["met"], found.counts["missed"]


def counted(promised: Slo | None, own: Slo, *took: Usage) -> tuple[int, int]:
    found = Attainment()
    for one in took:
        found.ended(promised, request(own), one)
    return outcome(found)


def test_a_request_meets_its_class_if_it_meets_every_target() -> None:
    took = usage(90, 9, 900), usage(101, 9, 900), usage(90, 11, 900), usage(90, 9, 1001)
    assert counted(PROMISED, PROMISED, *took) == (1, 3)


def test_one_token_has_no_time_per_token_to_miss_and_an_answer_in_one_piece_comes_first_when_it_comes() -> None:
    assert counted(PROMISED, PROMISED, usage(90, None, 90)) == (1, 0)
    assert counted(PROMISED, PROMISED, usage(None, None, 101)) == (0, 1)


def test_where_nothing_is_promised_nothing_is_counted() -> None:
    for promised in (None, Slo(priority=3)):
        assert counted(promised, Slo(ttft_ms=1), usage(90, 9, 900)) == (0, 0)
        waiting = Attainment()
        waiting.waits(promised, request(Slo(ttft_ms=1)), 3600.0)
        assert outcome(waiting) == (0, 0)


def test_who_asks_for_the_impossible_burns_nobodys_budget_and_who_asks_for_less_gets_that() -> None:
    assert counted(PROMISED, Slo(ttft_ms=1, tpot_ms=1, deadline_ms=1), usage(90, 9, 900)) == (1, 0)
    assert counted(PROMISED, Slo(ttft_ms=5000, tpot_ms=10, deadline_ms=9000), usage(4000, 9, 8000)) == (1, 0)


def test_errors_count_unless_they_are_the_clients_own() -> None:
    found = Attainment()
    found.failed(PROMISED, request(), ErrorCode.CANCELLED)
    found.failed(PROMISED, request(Slo(deadline_ms=5)), ErrorCode.DEADLINE_EXCEEDED)
    found.refused(PROMISED, Slo(deadline_ms=5), ErrorCode.DEADLINE_UNATTAINABLE)
    found.refused(PROMISED, PROMISED, ErrorCode.TOKEN_OUT_OF_RANGE)
    found.refused(None, BEST_EFFORT, ErrorCode.OVERLOADED)
    assert outcome(found) == (0, 0)
    found.failed(PROMISED, request(), ErrorCode.DEADLINE_EXCEEDED)
    found.failed(PROMISED, request(), ErrorCode.NODE_LOST)
    found.refused(PROMISED, PROMISED, ErrorCode.DEADLINE_UNATTAINABLE)
    found.refused(PROMISED, PROMISED, ErrorCode.OVERLOADED)
    assert outcome(found) == (0, 4)


def _ends(found: Attainment, job: Generation) -> Iterator[None]:
    found.ended(PROMISED, job, usage(150, 9, 900))
    yield
    found.failed(PROMISED, job, ErrorCode.NODE_LOST)
    yield
    found.failed(PROMISED, job, ErrorCode.CANCELLED)
    yield


@pytest.mark.parametrize("how", range(3))
def test_a_request_that_can_only_miss_counts_while_it_waits_and_once_however_it_ends(how: int) -> None:
    found, job = Attainment(), request()
    found.waits(PROMISED, job, 0.1)
    assert outcome(found) == (0, 0), "its first token could come now"
    found.waits(PROMISED, job, 0.11)
    found.waits(PROMISED, job, 0.5)
    assert outcome(found) == (0, 1)
    ends = _ends(found, job)
    for _ in range(how + 1):
        next(ends)
    assert outcome(found) == (0, 1)


def test_one_whose_first_token_came_in_time_waits_for_its_deadline() -> None:
    found, job = Attainment(), request()
    job.meter.token(0.09)
    found.waits(PROMISED, job, 0.5)
    assert outcome(found) == (0, 0)
    found.waits(PROMISED, job, 1.01)
    assert outcome(found) == (0, 1)


def test_who_gave_itself_more_time_is_waited_for() -> None:
    found = Attainment()
    found.waits(PROMISED, request(Slo(ttft_ms=5000, deadline_ms=9000)), 4.0)
    assert outcome(found) == (0, 0)


def test_what_comes_is_counted_with_what_it_asks_for_and_what_it_took() -> None:
    found = Attainment()
    found.turned_away()
    found.came(request(prompt=30, max_tokens=16))
    found.came(request(prompt=10, max_tokens=4))
    took = usage(90, 9, 900, prompt_tokens=10, cached_tokens=6, completion_tokens=2, total_tokens=12)
    found.ended(None, request(prompt=10, max_tokens=4), took)
    waits, idle = DeploymentName("waits"), DeploymentName("idle")
    told, waited_for = services({CHAT: found, waits: Attainment(), idle: Attainment()}, {CHAT: 2, waits: 1, idle: 0})
    assert (waited_for.deployment, waited_for.waiting, waited_for.arrived) == (waits, 1, 0)
    assert told.model_dump(exclude_none=True) == {
        "deployment": "chat",
        "arrived": 3,
        "waiting": 2,
        "sized": 2,
        "sized_prompt_tokens": 40,
        "sized_max_tokens": 20,
        "answered": 1,
        "answered_prompt_tokens": 10,
        "answered_max_tokens": 4,
        "prompt_tokens": 4,
        "output_tokens": 2,
        "met": 0,
        "missed": 0,
    }

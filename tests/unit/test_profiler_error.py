"""The error of predictions."""

import pytest

from profiler.error import REQUESTS, PredictionError


def test_nothing_is_said_before_anything_was_measured() -> None:
    assert PredictionError().terms == {}
    none = PredictionError().finished(predicted_ttft_ms=1, predicted_tpot_ms=1, ttft_ms=None, tpot_ms=0.0)
    assert none.terms == {}


def test_size_and_bias_are_told_apart() -> None:
    errors = PredictionError()
    for ttft_ms in (80.0, 100.0, 125.0):
        errors = errors.finished(predicted_ttft_ms=100, predicted_tpot_ms=9, ttft_ms=ttft_ms, tpot_ms=10)
    assert errors.terms == {"ttft_error": 0.2, "ttft_bias": 0.0, "tpot_error": 0.1, "tpot_bias": -0.1}


def test_one_request_that_went_astray_moves_nothing() -> None:
    errors = PredictionError()
    for ttft_ms in (100.0, 100.0, 10_000.0):
        errors = errors.finished(predicted_ttft_ms=110, predicted_tpot_ms=1, ttft_ms=ttft_ms, tpot_ms=None)
    assert errors.terms == pytest.approx({"ttft_error": 0.1, "ttft_bias": 0.1})


def test_only_the_latest_requests_count() -> None:
    errors = PredictionError()
    for _ in range(REQUESTS):
        errors = errors.finished(predicted_ttft_ms=2, predicted_tpot_ms=2, ttft_ms=1, tpot_ms=1)
    for _ in range(REQUESTS):
        errors = errors.finished(predicted_ttft_ms=1, predicted_tpot_ms=1, ttft_ms=1, tpot_ms=1)
    assert len(errors.ttft) == len(errors.tpot) == REQUESTS
    assert set(errors.terms.values()) == {0.0}


def test_the_errors_read_as_a_person_would_put_them() -> None:
    errors = PredictionError()
    assert errors.sentence is None
    errors = errors.finished(predicted_ttft_ms=90, predicted_tpot_ms=12.3, ttft_ms=100, tpot_ms=13)
    assert errors.sentence == (
        "12.3 ms a token predicted, 13.0 measured, 5% off; 90.0 ms to the first token predicted, 100.0 measured, "
        "10% off (medians of the latest 1 request)"
    )

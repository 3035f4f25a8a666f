"""What others take of a device, by a calculation that is timed now and then."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler.contention import LOOKS, RUNS, Contention
from profiler.device import DeviceMeter


def clock(lasts_s: list[float]) -> Iterator[float]:
    """Readings of a clock for calculations that take so long."""
    now = 0.0
    for each in lasts_s:
        yield now
        now += each
        yield now


def test_only_what_lasts_is_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [1.0, 1.0, 1.0, 6.0, 1.0, 3.0, 3.0, 3.0]  # the first is that of the beginning
    readings = clock([look for look in looks for _ in range(RUNS)])
    monkeypatch.setattr("profiler.contention.time.perf_counter", lambda: next(readings))
    device = Contention("cpu", threads=1)
    assert LOOKS == 3
    assert [device.measure() for _ in looks[1:]] == [1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0]


def test_one_calculation_that_is_held_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = clock([1.0, 1.0, 1.0, 9.0, 1.0, 9.0])
    monkeypatch.setattr("profiler.contention.time.perf_counter", lambda: next(readings))
    assert Contention("cpu", threads=1).measure() == 1.0


def test_a_meter_says_it_at_rest_alone(tmp_path: Path) -> None:
    meter = DeviceMeter("cpu", tmp_path, threads=1)
    assert meter.read(0.0).contention is None
    said = meter.read(1.0, at_rest=True).contention
    assert said is not None
    assert said >= 1
    assert meter.read(2.0).contention is None

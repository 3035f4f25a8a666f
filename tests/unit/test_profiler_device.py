"""Measurements of this very machine, and how they are cut down to what may be offered."""

from pathlib import Path

from profiler.calibrate import calibrate
from profiler.device import RESERVE_SHARE, Memory, cpu_pressure, device_memory, read_device, within_budget
from schemas.capacity import Provider
from schemas.errors import ErrorCode, ResplitError

GIB = 1 << 30


def test_without_a_budget_all_but_the_reserve_is_offered() -> None:
    assert within_budget(Memory(100, 80), None, 0) == Memory(100, 80 - int(100 * RESERVE_SHARE))
    assert within_budget(Memory(100, 3), None, 0) == Memory(100, 0)


def test_a_budget_is_an_upper_limit_and_no_promise() -> None:
    assert within_budget(Memory(10 * GIB, 8 * GIB), 2 * GIB, GIB // 2) == Memory(2 * GIB, 3 * GIB // 2)
    assert within_budget(Memory(10 * GIB, 8 * GIB), 2 * GIB, 3 * GIB) == Memory(2 * GIB, 0)
    assert within_budget(Memory(10 * GIB, GIB), 4 * GIB, 0).free_bytes < GIB


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    reading = read_device("cpu", tmp_path)
    assert 0 < reading.memory.free_bytes < reading.memory.total_bytes
    assert reading.disk_free_bytes > 0
    assert 0 <= reading.load <= 1
    assert reading.pressure is None or 0 <= reading.pressure <= 100


def test_a_gpu_that_cannot_be_asked_has_the_hosts_memory() -> None:
    assert device_memory("cuda").total_bytes > 0


def test_pressure_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "cpu"
    assert cpu_pressure(file) is None
    file.write_text(
        "some avg10=9.46 avg60=5.17 avg300=10.71 total=160\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    assert cpu_pressure(file) == 9.46
    file.write_text("nonsense")
    assert cpu_pressure(file) is None


def test_the_cpu_is_measured_through_onnx_runtime() -> None:
    provider = calibrate("cpu", threads=1)
    assert provider == Provider.model_validate(provider.model_dump())
    assert 1e8 < provider.flops_per_s < 1e13
    assert 1e8 < provider.bytes_per_s < 1e12
    assert provider.device


def test_a_provider_that_cannot_run_here_is_an_error_and_no_fallback() -> None:
    try:
        assert calibrate("cuda", threads=1).name == "cuda"
    except ResplitError as error:
        assert error.code is ErrorCode.PROVIDER_UNAVAILABLE
        assert error.field == "provider"

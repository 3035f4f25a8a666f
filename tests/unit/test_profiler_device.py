"""Measurements of this very machine, and how they are cut down to what may be offered."""

from pathlib import Path

import pynvml
import pytest

from profiler.calibrate import calibrate
from profiler.device import RESERVE_SHARE, DeviceMeter, Memory, device_memory, within_budget
from profiler.disk import Counters, DiskMeter, read_counters, read_rate
from profiler.gpu import GpuReading, gpu_memory_bytes, gpu_name, read_gpu, throttle_reasons
from profiler.power import CpuMeter
from profiler.pressure import Pressure, read_pressure
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
    meter = DeviceMeter("cpu", tmp_path)
    for now in (0.0, 1.0):
        reading = meter.read(now)
        assert 0 < reading.memory.free_bytes < reading.memory.total_bytes
        assert reading.disk_free_bytes > 0
        assert 0 <= reading.load <= 1
        assert reading.gpu_load is None
        figures = (reading.pressure.cpu, reading.pressure.memory, reading.pressure.io)
        assert all(figure is None or 0 <= figure <= 100 for figure in figures)
        told = (reading.compute.power_w, reading.compute.energy_j, reading.disk_read_bytes_per_s)
        assert all(figure is None or figure >= 0 for figure in told)


def test_a_gpu_that_cannot_be_asked_has_the_hosts_memory() -> None:
    assert device_memory("cuda").total_bytes > 0


@pytest.mark.skipif(gpu_name() is not None, reason="this machine has a GPU")
def test_without_a_driver_every_answer_about_the_gpu_is_none(tmp_path: Path) -> None:
    assert gpu_memory_bytes() is None
    assert read_gpu() == GpuReading(None, None, None, None, None)
    reading = DeviceMeter("cuda", tmp_path).read(0.0)
    assert (reading.gpu_load, reading.compute) == (None, read_gpu())


def test_throttle_reasons_are_named_once_and_by_their_cause() -> None:
    assert throttle_reasons(0) == ()
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonGpuIdle) == ()
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonUserDefinedClocks) == ()
    heat = pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    assert throttle_reasons(heat | pynvml.nvmlClocksThrottleReasonHwSlowdown) == ("thermal",)
    assert throttle_reasons(heat | pynvml.nvmlClocksThrottleReasonSwPowerCap) == ("thermal", "power")
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown) == ("power",)
    assert throttle_reasons(pynvml.nvmlClocksThrottleReasonHwSlowdown) == ("hardware",)


def test_pressure_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    assert read_pressure(tmp_path) == Pressure(None, None, None)
    full = "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    (tmp_path / "cpu").write_text("some avg10=9.46 avg60=5.17 avg300=10.71 total=160\n" + full)
    (tmp_path / "memory").write_text("some avg10=0.50 avg60=0.00 avg300=0.00 total=1\n" + full)
    (tmp_path / "io").write_text("some avg10=12.00 avg60=0.00 avg300=0.00 total=1\n" + full)
    assert read_pressure(tmp_path) == Pressure(9.46, 0.5, 12.0)


@pytest.mark.parametrize("text", ["nonsense", "", "some avg10=nan", "some avg10=-1", "some avg10=101", "some avg60=1"])
def test_pressure_that_is_none_is_not_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu").write_text(text)
    (tmp_path / "memory").write_bytes(b"\xff\xfe")
    assert read_pressure(tmp_path) == Pressure(None, None, None)


def zone(powercap: Path, name: str, part: str, counter_uj: int, range_uj: int = 10_000_000) -> None:
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(part + "\n")
    (folder / "energy_uj").write_text(f"{counter_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")


def test_energy_counts_whole_packages_and_survives_a_counter_that_wraps(tmp_path: Path) -> None:
    meter = CpuMeter(tmp_path, tmp_path / "cpus")
    assert (meter.read(0.0).energy_j, meter.read(0.0).power_w) == (None, None)
    for name, part in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        zone(tmp_path, name, part, 9_000_000)
    first = meter.read(1.0)
    assert (first.energy_j, first.power_w) == (0.0, None)
    zone(tmp_path, "intel-rapl:0", "package-0", 9_500_000)
    second = meter.read(2.0)
    assert (second.energy_j, second.power_w) == (0.5, 0.5)
    zone(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
    third = meter.read(4.0)
    assert (third.energy_j, third.power_w) == (3.0, 1.25)


def test_a_package_that_appears_late_does_not_bring_its_past(tmp_path: Path) -> None:
    meter = CpuMeter(tmp_path, tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    meter.read(0.0)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    assert meter.read(1.0).energy_j == 0.0


def test_a_processor_is_throttled_while_its_count_grows(tmp_path: Path) -> None:
    meter = CpuMeter(tmp_path, tmp_path)
    assert meter.read(0.0).throttled is None
    file = tmp_path / "cpu0" / "thermal_throttle" / "core_throttle_count"
    file.parent.mkdir(parents=True)
    file.write_text("5")
    assert meter.read(1.0).throttled == ()
    file.write_text("6")
    assert meter.read(2.0).throttled == ("thermal",)
    assert meter.read(3.0).throttled == ()


def test_the_disks_rate_is_that_of_periods_of_reading(tmp_path: Path) -> None:
    before = Counters(0, 0, 100)
    assert read_rate(before, Counters(100 << 20, 0, 600)) == 200 << 20
    assert read_rate(before, Counters(1 << 20, 0, 600)) is None, "too little to tell"
    assert read_rate(before, Counters(100 << 20, 100 << 20, 600)) is None, "it was writing too"
    assert read_rate(before, Counters(100 << 20, 0, 100)) is None, "a counter that stands still"


def test_the_counters_are_those_of_the_disk_that_holds_the_folder(tmp_path: Path) -> None:
    stats = tmp_path / "diskstats"
    device = (8, 1)
    assert read_counters(stats, device) is None
    stats.write_text("   8       0 sda 9 9 9 9 9 9 9 9 9 9 9\n   8       1 sda1 5 0 2048 70 3 0 16 4 0 50 74 0 0 0 0\n")
    assert read_counters(stats, device) == Counters(2048 * 512, 16 * 512, 50)
    assert read_counters(stats, (8, 2)) is None
    assert read_counters(stats, None) is None
    stats.write_text("8 1 sda1 5 0\n")
    assert read_counters(stats, device) is None
    assert DiskMeter(tmp_path / "absent", stats).read() is None


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

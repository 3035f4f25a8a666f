"""A processor's energy and heat: RAPL counters, thermal sensors, and how often it slowed itself down.

All of it is read from `/sys`, where it exists and this user may read it; the rest is None. What a virtual machine
or a container shows is usually nothing at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from schemas.capacity import ThrottleReason

POWERCAP = Path("/sys/class/powercap")
CPUS = Path("/sys/devices/system/cpu")
RANGE = "max_energy_range_uj"
"""Where a counter starts again at zero."""
SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "cpu-thermal")
"""Drivers of sensors that sit in a processor; others measure a disk or the room."""


@dataclass(frozen=True)
class CpuReading:
    """One look at the processor, in the units of `schemas.capacity.Capacity`."""

    throttled: tuple[ThrottleReason, ...] | None
    temperature_c: float | None
    power_w: float | None
    energy_j: float | None


@dataclass(frozen=True)
class _Energy:
    """RAPL's counters when they were last read, and what they counted until then, every wrap included."""

    at_s: float
    counters_uj: dict[str, int]
    total_j: float


class CpuMeter:
    """Reads the processor again and again; power and throttling are those since its previous reading."""

    def __init__(self, powercap: Path = POWERCAP, cpus: Path = CPUS) -> None:
        self._powercap = powercap
        self._cpus = cpus
        self._energy: _Energy | None = None
        self._slowdowns: int | None = None

    def read(self, now_s: float) -> CpuReading:
        """The figures at `now_s` of a steady clock; never raises. Power is None in the first reading."""
        before = self._energy
        self._energy = after = self._count(before, now_s)
        power_w = None
        if before is not None and after is not None and now_s > before.at_s:
            power_w = (after.total_j - before.total_j) / (now_s - before.at_s)
        return CpuReading(self._throttled(), cpu_temperature_c(), power_w, None if after is None else after.total_j)

    def _count(self, before: _Energy | None, now_s: float) -> _Energy | None:
        counters: dict[str, int] = {}
        spent_uj = 0
        # `intel-rapl:0` is a package, `intel-rapl:0:1` a part that it includes. (AMD's driver has the same name.)
        for zone in sorted(self._powercap.glob("intel-rapl:*")):  # the driver for AMD's has the same name
            counter = _number(zone / "energy_uj")
            if counter is None or not _text(zone / "name").startswith("package"):
                continue  # a part of a package, or the whole machine, which would be counted twice
            counters[zone.name] = counter
            last = counter if before is None else before.counters_uj.get(zone.name, counter)
            spent_uj += counter - last
            if counter < last:
                spent_uj += _number(zone / RANGE) or last
        if not counters:
            return None
        return _Energy(now_s, counters, (0.0 if before is None else before.total_j) + spent_uj / 1e6)

    def _throttled(self) -> tuple[ThrottleReason, ...] | None:
        """("thermal",) if any core or package was slowed for its heat since the last reading."""
        found = [number for file in self._slowdown_files() if (number := _number(file)) is not None]
        if not found:
            return None
        before, self._slowdowns = self._slowdowns, sum(found)
        return ("thermal",) if before is not None and self._slowdowns > before else ()

    def _slowdown_files(self) -> Iterator[Path]:
        for name in ("core_throttle_count", "package_throttle_count"):
            yield from self._cpus.glob(f"cpu[0-9]*/thermal_throttle/{name}")


def cpu_temperature_c() -> float | None:
    """The processor's hottest sensor in degrees Celsius, or None where there is none to read."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError, RuntimeError, ValueError):  # not Linux, or a sensor that answers nonsense
        return None
    found = [sensor.current for name in SENSORS for sensor in sensors.get(name, ())]
    sound = [celsius for celsius in found if -100 <= celsius <= 300]
    return max(sound, default=None)


def _number(file: Path) -> int | None:
    try:
        number = int(_text(file))
    except ValueError:
        return None
    return number if number >= 0 else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""

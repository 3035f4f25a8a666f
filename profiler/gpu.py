"""What the NVIDIA driver says of the GPU in use, through NVML; None for whatever it does not say.

The driver's library is loaded and started once per process. A device may answer some questions and call others
"Not Supported" (Jetson and GB10 do for memory, many boards for energy), so each is asked for itself.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from schemas.capacity import ThrottleReason

REASONS: dict[str, ThrottleReason] = {
    "SwThermalSlowdown": "thermal",
    "HwThermalSlowdown": "thermal",
    "SwPowerCap": "power",
    "HwPowerBrakeSlowdown": "power",
    "HwSlowdown": "hardware",
}
"""NVML's reasons for lower clocks that mean a slower device. The others (idle, a clock that somebody set) do not."""


@dataclass(frozen=True)
class GpuReading:
    """One look at a GPU, in the units of `schemas.capacity.Capacity`."""

    load: float | None
    throttled: tuple[ThrottleReason, ...] | None
    temperature_c: float | None
    power_w: float | None
    energy_j: float | None


def gpu_name() -> str | None:
    """The name of the GPU in use, or None without a driver."""
    name = _ask("nvmlDeviceGetName")
    return name.decode() if isinstance(name, bytes) else name


def gpu_memory_bytes() -> tuple[int, int] | None:
    """(total, free) of the GPU's own memory, or None without a driver or where it shares the host's."""
    found = _ask("nvmlDeviceGetMemoryInfo")
    return None if found is None else (int(found.total), int(found.free))


def read_gpu() -> GpuReading:
    """Load, temperature, power and what slows the GPU; None in every field without a driver. Never raises."""
    rates = _ask("nvmlDeviceGetUtilizationRates")
    reasons = _ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # the name that drivers before 535 know
        reasons = _ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return GpuReading(
        load=None if rates is None else _scaled(rates.gpu, 0.01, most=1.0),
        throttled=None if reasons is None else throttle_reasons(int(reasons)),
        temperature_c=_scaled(_ask("nvmlDeviceGetTemperature", 0), 1.0, most=300.0),  # 0: of the die
        power_w=_scaled(_ask("nvmlDeviceGetPowerUsage"), 1e-3),
        energy_j=_scaled(_ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
    )


def throttle_reasons(bits: int) -> tuple[ThrottleReason, ...]:
    """NVML's bit mask of clock event reasons in our words, each once.

    Hardware slowdown is raised together with its cause where the board tells one; then only the cause is named.
    """
    import pynvml  # noqa: PLC0415 - only nodes that ask for CUDA need the driver's library

    found = [word for name, word in REASONS.items() if bits & int(getattr(pynvml, f"nvmlClocksThrottleReason{name}"))]
    causes = tuple(dict.fromkeys(word for word in found if word != "hardware"))
    return causes or (("hardware",) if found else ())


def _ask(function: str, *arguments: Any) -> Any:
    """What NVML answers about the GPU in use, or None."""
    device = _device()
    if device is None:
        return None
    try:
        import pynvml  # noqa: PLC0415 - as above

        question: Callable[..., Any] = getattr(pynvml, function)
        return question(device, *arguments)
    except Exception:  # not supported, not permitted, not in this library, lost: each a type of its own, all None
        return None


@cache
def _device() -> Any:
    """NVML's handle of the first GPU that CUDA may use, or None; asked for once in a process."""
    try:
        import pynvml  # noqa: PLC0415 - as above

        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        if first.startswith(("GPU-", "MIG-")):
            return pynvml.nvmlDeviceGetHandleByUUID(first)
        return pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)
    except Exception:  # no library, no driver, no device: each raises a type of its own, and all mean None
        return None


def _scaled(value: Any, factor: float, most: float = float("inf")) -> float | None:
    scaled = None if value is None else float(value) * factor
    return scaled if scaled is not None and 0 <= scaled <= most else None

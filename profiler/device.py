"""What the device has and does right now: memory, load, pressure, disk. Values only; nothing is published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

RESERVE_SHARE = 0.05
"""Share of the memory that is never offered: the system, other programs and ONNX Runtime's work buffers live there."""

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True)
class Memory:
    """Bytes of the memory in which a provider keeps weights and caches."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Reading:
    """One look at the device, in the units of `schemas.capacity.Capacity`."""

    memory: Memory
    disk_free_bytes: int
    load: float
    pressure: float | None


def read_device(
    provider: Literal["cpu", "cuda"], disk: Path, budget_bytes: int | None = None, used_bytes: int = 0
) -> Reading:
    """Measure the device once.

    `budget_bytes` is what the operator lets this agent use, if it was told, and `used_bytes` what the agent's
    blocks and caches already take of it. The load is that since the previous call in this process (0 in the first).
    """
    memory = within_budget(device_memory(provider), budget_bytes, used_bytes)
    return Reading(memory, psutil.disk_usage(str(disk)).free, psutil.cpu_percent() / 100, cpu_pressure())


def within_budget(memory: Memory, budget_bytes: int | None, used_bytes: int) -> Memory:
    """What may be offered of `memory`: all but the reserve, or what is left of the budget if that is less."""
    free = memory.free_bytes - int(memory.total_bytes * RESERVE_SHARE)
    if budget_bytes is None:
        return Memory(memory.total_bytes, max(0, free))
    return Memory(min(budget_bytes, memory.total_bytes), max(0, min(free, budget_bytes - used_bytes)))


def device_memory(provider: Literal["cpu", "cuda"]) -> Memory:
    """The memory of the provider's device: the GPU's own, else what Linux says is available to this process."""
    gpu = _gpu_memory() if provider == "cuda" else None
    if gpu is not None:
        return gpu
    host = psutil.virtual_memory()
    memory = Memory(host.total, host.available)
    group = _cgroup_memory()
    if group is None:
        return memory
    return Memory(min(memory.total_bytes, group.total_bytes), min(memory.free_bytes, group.free_bytes))


def gpu_name() -> str | None:
    """The first GPU's own name, or None without a driver."""
    try:
        import pynvml  # noqa: PLC0415 - only nodes that ask for CUDA need the driver's library

        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # no library, no driver, no device: each raises a type of its own, and all mean None.
        return None
    return name.decode() if isinstance(name, bytes) else str(name)


def cpu_name() -> str:
    """The processor's own name, as far as Linux knows it."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next(named, "CPU")


def cpu_pressure(file: Path = PROC / "pressure" / "cpu") -> float | None:
    """Per cent of the last 10 s in which some task waited for the CPU, or None where the kernel does not say."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    some = next((line.split()[1:] for line in lines if line.startswith("some ")), [])
    fields = dict(word.split("=", 1) for word in some if "=" in word)
    try:
        return float(fields["avg10"])
    except (KeyError, ValueError):
        return None


def _gpu_memory() -> Memory | None:
    # Devices that share the host's memory (Jetson, GB10) answer "Not Supported": the host's figures are theirs.
    try:
        import pynvml  # noqa: PLC0415 - only nodes that ask for CUDA need the driver's library

        pynvml.nvmlInit()
        found = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # as in gpu_name
        return None
    return Memory(int(found.total), int(found.free))


def _cgroup_memory() -> Memory | None:
    """The limit of this process's control group (version 2), as containers and systemd set it, if there is one."""
    try:
        line = next(line for line in (PROC / "self" / "cgroup").read_text().splitlines() if line.startswith("0::"))
        group = CGROUPS / line.removeprefix("0::").lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
        # Cached file pages count as used, but the kernel gives them up before it refuses an allocation.
        return Memory(int(limit), max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    except (OSError, StopIteration, ValueError):
        return None

"""What the device has and does right now: memory, load, pressure, heat, power, disk. Values only; nothing is published.

A figure that the machine does not tell is None, and asking for it never raises.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from profiler.contention import Contention
from profiler.disk import DiskMeter
from profiler.gpu import GpuReading, gpu_memory_bytes, read_gpu
from profiler.power import CpuMeter, CpuReading
from profiler.pressure import Pressure, read_pressure

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
    """One look at the device, in the units of `schemas.capacity.Capacity`.

    `compute` is the device that computes: the GPU in use, else the processor.
    """

    memory: Memory
    disk_free_bytes: int
    disk_models_bytes: int | None
    """What files of models may take at most; None where nobody asked."""
    disk_read_bytes_per_s: float | None
    load: float
    pressure: Pressure
    gpu_load: float | None
    compute: GpuReading | CpuReading
    contention: float | None = None
    """Measured at rest alone."""


class DeviceMeter:
    """Reads one device again and again; load, power and throttling are those since its previous reading.

    One thread at a time may read. What a process reads first has a load of 0 and no power of a processor.
    """

    def __init__(self, provider: Literal["cpu", "cuda"], disk: Path, threads: int = 1) -> None:
        """`threads` of the processor compute."""
        self._provider = provider
        self._threads = threads
        self._contention: Contention | None = None
        self._disk = disk
        self._disk_meter = DiskMeter(disk)
        self._cpu_meter = CpuMeter()

    def read(
        self,
        now_s: float,
        budget_bytes: int | None = None,
        used_bytes: int = 0,
        promised_bytes: int = 0,
        at_rest: bool = False,
    ) -> Reading:
        """Measure the device once, at `now_s` of a steady clock.

        `budget_bytes` is what the operator lets this agent use, if it was told, and `used_bytes` what the agent
        already takes of it. `promised_bytes` are of caches that were not written to yet: the kernel counts them as
        free. `at_rest`: this process computes nothing, so that what slows a small
        calculation is somebody else.
        """
        gpu = read_gpu() if self._provider == "cuda" else None
        return Reading(
            memory=within_budget(device_memory(self._provider), budget_bytes, used_bytes, promised_bytes),
            disk_free_bytes=psutil.disk_usage(str(self._disk)).free,
            disk_models_bytes=None,
            disk_read_bytes_per_s=self._disk_meter.read(),
            load=psutil.cpu_percent() / 100,
            pressure=read_pressure(),
            gpu_load=None if gpu is None else gpu.load,
            compute=self._cpu_meter.read(now_s) if gpu is None else gpu,
            contention=self._contended() if at_rest else None,
        )

    def _contended(self) -> float:
        if self._contention is None:
            self._contention = Contention(self._provider, self._threads)
        return self._contention.measure()


def within_budget(memory: Memory, budget_bytes: int | None, used_bytes: int, promised_bytes: int = 0) -> Memory:
    """What may be offered of `memory`: all but the reserve, or what is left of the budget if that is less, and of
    either what is not promised yet."""
    free = memory.free_bytes - int(memory.total_bytes * RESERVE_SHARE)
    if budget_bytes is None:
        return Memory(memory.total_bytes, max(0, free - promised_bytes))
    free = min(free, budget_bytes - used_bytes) - promised_bytes
    return Memory(min(budget_bytes, memory.total_bytes), max(0, free))


def device_memory(provider: Literal["cpu", "cuda"]) -> Memory:
    """The memory of the provider's device: the GPU's own, else what Linux says is available to this process."""
    # Devices that share the host's memory (Jetson, GB10) answer "Not Supported": the host's figures are theirs.
    gpu = gpu_memory_bytes() if provider == "cuda" else None
    if gpu is not None:
        return Memory(*gpu)
    host = psutil.virtual_memory()
    memory = Memory(host.total, host.available)
    group = _cgroup_memory()
    if group is None:
        return memory
    return Memory(min(memory.total_bytes, group.total_bytes), min(memory.free_bytes, group.free_bytes))


def cpu_name() -> str:
    """The processor's own name, as far as Linux knows it."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next(named, "CPU")


def placed() -> dict[str, str | tuple[int, ...] | None]:
    """Where this process runs, as `Capacity` has it: which kernel, and on which of its processors."""
    try:
        boot = (PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    except OSError:
        return {"machine": None, "cores": ()}
    return {"machine": boot, "cores": tuple(sorted(os.sched_getaffinity(0)))}


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

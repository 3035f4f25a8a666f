"""Pressure stall information (PSI): how much tasks on this machine wait for the CPU, memory and disks."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/proc/pressure")


@dataclass(frozen=True)
class Pressure:
    """Per cent of the last 10 s in which some task waited, 0 to 100; None where the kernel does not say."""

    cpu: float | None
    memory: float | None
    io: float | None


def read_pressure(folder: Path = FOLDER) -> Pressure:
    """The three figures now; never raises."""
    return Pressure(*(_some_avg10(folder / name) for name in ("cpu", "memory", "io")))


def _some_avg10(file: Path) -> float | None:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    some = next((line.split()[1:] for line in lines if line.startswith("some ")), [])
    fields = dict(word.split("=", 1) for word in some if "=" in word)
    try:
        share = float(fields["avg10"])
    except (KeyError, ValueError):
        return None
    return share if 0 <= share <= 100 else None  # also false for NaN

"""How fast the disk of the store reads, taken from what the kernel counts while blocks are fetched and loaded.

Nothing is read for the sake of measuring. What the page cache answers never reaches the disk and is not counted.
"""

import os
from dataclasses import dataclass
from pathlib import Path

DISKSTATS = Path("/proc/diskstats")
SECTOR_BYTES = 512
"""The unit of the kernel's counters, whatever the disk's own sectors are."""
ENOUGH_BYTES = 8 << 20
"""Less than this read between two looks says more about single requests than about the disk's rate."""
READS_PER_WRITE = 4
"""A disk that was busy writing too shows less than it can read: then the look does not count."""


@dataclass(frozen=True)
class Counters:
    """Of one disk since boot: bytes read and written, and the time in which any request was under way."""

    read_bytes: int
    written_bytes: int
    busy_ms: int


class DiskMeter:
    """Watches the disk that holds a folder; the rate is that of the latest look that counted."""

    def __init__(self, folder: Path, diskstats: Path = DISKSTATS) -> None:
        self._diskstats = diskstats
        self._device = _device(folder)
        self._last: Counters | None = None
        self._bytes_per_s: float | None = None

    def read(self) -> float | None:
        """Bytes per second while it was busy reading, or None before it was; never raises."""
        now = read_counters(self._diskstats, self._device)
        if now is None:
            return self._bytes_per_s
        if self._last is not None:
            self._bytes_per_s = read_rate(self._last, now) or self._bytes_per_s
        self._last = now
        return self._bytes_per_s


def read_rate(before: Counters, after: Counters) -> float | None:
    """Bytes per second of a period that was mostly reading, None of any other."""
    read, written = after.read_bytes - before.read_bytes, after.written_bytes - before.written_bytes
    busy_ms = after.busy_ms - before.busy_ms
    if read < ENOUGH_BYTES or read < READS_PER_WRITE * written or busy_ms <= 0:
        return None
    return 1e3 * read / busy_ms


def read_counters(diskstats: Path, device: tuple[int, int] | None) -> Counters | None:
    """The counters of the disk with these (major, minor) numbers, or None if the kernel keeps none for it."""
    if device is None:
        return None
    try:
        rows = [line.split() for line in diskstats.read_text().splitlines()]
        fields = next(row[3:] for row in rows if tuple(row[:2]) == (str(device[0]), str(device[1])))
        return Counters(int(fields[2]) * SECTOR_BYTES, int(fields[6]) * SECTOR_BYTES, int(fields[9]))
    except (OSError, StopIteration, IndexError, ValueError):
        return None


def _device(folder: Path) -> tuple[int, int] | None:
    try:
        number = folder.stat().st_dev
    except OSError:
        return None
    return os.major(number), os.minor(number)

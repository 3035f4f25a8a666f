"""Who belongs to a cluster, as somebody keeps up with it who signs nothing: a client that seals, a person who verifies.

It begins with the roster in a folder and takes newer ones from the bus, verified by the root in that folder, only
forward. What it took is remembered there, where that may be written, so that the next process begins with it.
"""

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from bus.folders import KNOWN, ROSTER, keep_roster, read_file, read_root
from bus.remembered import recall
from schemas.base import NodeId
from schemas.errors import ResplitError
from schemas.known import Known, after_roster, held
from schemas.roster import WRITERS, Roster, open_roster

log = logging.getLogger(__name__)


def _now() -> datetime:
    return datetime.now(UTC)


class Membership:
    """The newest roster that a folder or the bus has shown. Several processes may use one folder."""

    def __init__(self, folder: Path, now: Callable[[], datetime] = _now) -> None:
        """Raises `ResplitError` where the folder, a member's or the cluster's, holds no roster that its root signed,
        or an older one than it remembers."""
        self._folder = folder
        self._now = now
        self._lock = threading.Lock()
        self._stamp = self._stamped()
        self._known, self._roster = self._read()

    @property
    def roster(self) -> Roster:
        """The newest that was shown."""
        return self._roster

    def look(self) -> None:
        """Take in what was put into the folder since. Errors are those of the constructor."""
        with self._lock:
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            known, roster = self._read()
            if (roster.root_version, roster.version) >= (self._roster.root_version, self._roster.version):
                self._known, self._roster = known, roster
            self._stamp = stamp

    def take(self, data: bytes) -> bool:
        """Take a roster from the bus, and remember it where that is possible; whether it is news. Errors are those of
        `after_roster`."""
        with self._lock:
            known = after_roster(self._known, data, self._now())
            if known == self._known:
                return False
            self._known, self._roster = known, open_roster(known.root, data)
            try:
                self._remember(data)
            except (ResplitError, OSError) as error:
                log.info("the roster of version %d is not remembered: %s", self._roster.version, error)
            return True

    def _read(self) -> tuple[Known, Roster]:
        known = recall(self._folder / KNOWN) or read_root(self._folder)
        return held(known, read_file(self._folder / ROSTER))

    def _remember(self, data: bytes) -> None:
        if not self._is_ours():
            return
        with _locked(self._folder):
            on_disk = recall(self._folder / KNOWN)
            assert on_disk is not None, "a member's folder has it"
            known = after_roster(on_disk, data, self._now())
            if known != on_disk:
                keep_roster(self._folder, known, data)

    def _is_ours(self) -> bool:
        """Whether what is seen may be remembered in the folder. Agents and orchestrators do that themselves, and the
        cluster's own folder, where nobody logs in, is written by who holds its root."""
        named = [self._roster.member(NodeId(path.stem)) for path in self._folder.glob("*.nk")]
        return bool(named) and all(member is None or member.role not in WRITERS for member in named)

    def _stamped(self) -> tuple[int, int] | None:
        try:
            found = (self._folder / ROSTER).stat()
        except OSError:
            return None  # reading it says what is wrong
        return found.st_mtime_ns, found.st_ino


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that keep up in this folder: two that wrote at once could leave an old roster beside
    the memory of a new one."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)

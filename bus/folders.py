"""The public files of a member's folder, and of the cluster's (`bus.cluster_folder`), which has no `known.json`."""

from pathlib import Path

from bus.remembered import PUBLIC, remember, write_durably
from schemas.errors import ErrorCode, ResplitError
from schemas.known import Known, first_known

KNOWN, ROSTER, FIRST_ROOT = "known.json", "roster.signed", "root.1.signed"


def read_file(path: Path) -> bytes:
    """A file of a member's folder; raises `ResplitError(INVALID_REQUEST)` naming it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise missing(path, error.strerror or str(error)) from error


def read_public(path: Path) -> bytes:
    """A file of a cluster's folder; raises `ResplitError(INVALID_REQUEST)` naming it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; name a folder that `resplit init` or `resplit join` made"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, path.name) from error


def read_root(folder: Path) -> Known:
    """Where whoever reads a cluster's own folder begins: with its first root."""
    return first_known(read_public(folder / FIRST_ROOT))


def keep_roster(folder: Path, known: Known, data: bytes) -> None:
    """Keep a roster in a member's folder, and that it was taken; raises `ResplitError(INTERNAL)` as `remember` does."""
    # First the roster: where power fails before the other, who reads the folder finds one that is newer.
    write_durably(folder / ROSTER, data, PUBLIC)
    remember(folder / KNOWN, known)


def missing(path: Path, why: str) -> ResplitError:
    """The error for a file of a member's folder that cannot be read."""
    message = f"cannot read {path}: {why}; `resplit join BUNDLE --keys {path.parent}` makes a member's folder"
    return ResplitError(ErrorCode.INVALID_REQUEST, message, path.name)

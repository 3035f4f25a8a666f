"""What a process remembers of signed documents, on the disk: written and durable before it is acted upon.

A rollback shown to a process that has just been restarted is refused only because of this file. So it is never half
written, it carries its own hash, and one that cannot be read is an error and not "nothing known": a person who takes
it away knows that they do.
"""

import contextlib
import os
from hashlib import sha256
from pathlib import Path

from schemas.codec import decode, encode
from schemas.errors import ErrorCode, ResplitError
from schemas.known import Known

FILE_BYTES_MAX = 8 << 20
"""`Known` at its largest: `DEPLOYMENTS_MAX` plans of some 200 bytes, and a root."""
PRIVATE = 0o600
PUBLIC = 0o644


def recall(path: Path) -> Known | None:
    """What was remembered in `path`; None where there is no such file.

    Raises `ResplitError(CORRUPT_FILE)` for a file that is there and is not what `remember` wrote.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    said, newline, content = data.partition(b"\n")
    if len(data) > FILE_BYTES_MAX or not newline or said != sha256(content).hexdigest().encode():
        raise _unreadable(path, "it is not as it was written")
    try:
        return decode(Known, content, path.name)
    except ResplitError as error:
        raise _unreadable(path, error.message) from error


def remember(path: Path, known: Known) -> None:
    """Keep `known` in `path`. When this returns it survives a loss of power; until then what was there does.

    Raises `ResplitError(INTERNAL)` where the disk does not take it: then what it says must not be acted upon.
    """
    content = encode(known)
    write_durably(path, sha256(content).hexdigest().encode() + b"\n" + content, PRIVATE)


def write_durably(path: Path, data: bytes, mode: int) -> None:
    """Put `data` into `path` with the permissions `mode`: all of it or, after a crash or an error, none.

    Raises `ResplitError(INTERNAL)` naming the file and what the system said.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.unlink(missing_ok=True)
        # Created with the mode it keeps: a secret is never readable by others, not even while it is written.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        message = f"cannot write {path}: {error.strerror or error}; make room or permit it, and try again"
        raise ResplitError(ErrorCode.INTERNAL, message, path.name) from error


def _sync_folder(folder: Path) -> None:
    # A rename is in the folder, and the folder is a file of its own: without this a crash can undo it.
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _unreadable(path: Path, why: str) -> ResplitError:
    message = (
        f"cannot read {path}, which keeps what this process has seen of signed documents: {why}. "
        f"Restore the file, or delete it and join again with a new bundle: whoever controls the bus could use the gap"
    )
    return ResplitError(ErrorCode.CORRUPT_FILE, message, path.name)

"""One process alone runs as a member: a second one with the same keys would talk over the first."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError


@contextlib.contextmanager
def sole(folder: Path, name: NodeId) -> Iterator[None]:
    """While this lasts no other process on this machine runs as `name` with the keys of `folder`; when a process ends,
    however it does, another may.

    Raises `ResplitError`: FORBIDDEN with the process that runs as it already, INVALID_REQUEST where the folder cannot
    be written to.
    """
    path = folder / f"{name}.lock"
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; who runs as {name!r} keeps what it has seen in that folder"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "keys") from error
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            runs = os.read(held, 32).decode(errors="replace").strip() or "another"
            message = (
                f"{name!r} runs already with the keys in {folder}, as process {runs}; end that one first, or enroll a "
                "member of another name"
            )
            raise ResplitError(ErrorCode.FORBIDDEN, message, "node") from error
        os.ftruncate(held, 0)
        os.write(held, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(held)

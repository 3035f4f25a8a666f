"""Plaintext weights for ONNX Runtime, in memory and under the names by which graphs know them.

ONNX Runtime reads weights from a folder. A folder on tmpfs is memory, and the files can go as soon as the session is
made: what the session still maps stays until it is closed, and what it copied it no longer needs. Measured with
128 MiB of weights, handing the bytes over instead (`add_external_initializers_from_files_in_memory`) takes three
times the weights while the session is made, and this takes once (used as they are) or twice (copied into a kernel's
own layout), as much as with files on a disk.

tmpfs can be swapped out like any memory of a process: where that matters, encrypt the swap or have none.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.sealing import FileContext, open_file
from schemas.errors import ErrorCode, ResplitError

MEMORY = Path("/dev/shm")
"""tmpfs, on Linux; half of the machine's memory unless the system was told otherwise, in a container often 64 MiB."""
PREFIX = "resplit-weights-"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def memory_folder(root: Path = MEMORY) -> Iterator[Path]:
    """A new folder under `root` that only this user may enter; it is gone, with all that is in it, on leaving.

    A process that is killed in between leaves it behind: call `forget_folders` when it starts again.
    Raises `ResplitError(MISSING_DEPENDENCY)` where there is no `root`.
    """
    if not root.is_dir():
        message = f"there is no folder {root}: sealed blocks are opened in memory; mount a tmpfs there"
        raise ResplitError(ErrorCode.MISSING_DEPENDENCY, message)
    made = Path(tempfile.mkdtemp(prefix="." + PREFIX, dir=root))
    held = os.open(made, os.O_RDONLY)
    try:
        # It gets the name by which `forget_folders` finds it when it is locked, so that no other process takes it.
        fcntl.flock(held, fcntl.LOCK_EX)
        folder = made.rename(made.with_name(made.name.removeprefix(".")))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(held)


def unseal(sealed: Path, folder: Path, block_key: bytes, context: FileContext) -> bool:
    """Put the plaintext of a sealed file into `folder` under its digest, unless it is there: blocks share weights.
    Whether that was done: then the sealed file is whole.

    Raises `ResplitError(CORRUPT_FILE)` as `open_file` does, and MODEL_TOO_LARGE where there is no room; then nothing
    of the file is there.
    """
    target = folder / context.file
    if target.exists():
        return False
    try:
        with sealed.open("rb") as source, target.open("xb") as plain:
            for part in open_file(source, block_key, context):
                plain.write(part)
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            message = f"no room in {folder.parent} for the weights of block {context.block}; make that tmpfs larger"
            raise ResplitError(ErrorCode.MODEL_TOO_LARGE, message) from error
        raise
    return True


def forget_folders(root: Path = MEMORY) -> int:
    """Remove what processes of this user that are gone have left behind under `root`; how many folders that were."""
    forgotten = 0
    for folder in root.glob(PREFIX + "*"):
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            continue
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            forgotten += 1
        except BlockingIOError:
            pass  # its process lives.
        finally:
            os.close(held)
    return forgotten

"""The keys of sealed models, as they lie beside a store: in files for their owner alone, never among the blobs.

Whoever has them can open every block, so they are where models are sealed and where keys are handed to hosts (the
orchestrators), and nowhere else. They are in no backup but the owner's: without them a sealed model is noise.
"""

import os
from collections.abc import Callable

from models.partial import publish
from models.store import Store
from schemas import codec
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.sealed import ModelKeys

KeyOf = Callable[[int], bytes]
"""The key of a block. Raises `ResplitError` where there is none."""

PRIVATE = 0o600


def has_keys(store: Store, model: Digest) -> bool:
    """Whether the keys of this sealed model are here; a model in the open has none."""
    return (store.keys_folder / model).is_file()


def read_keys(store: Store, model: Digest) -> ModelKeys:
    """The keys of a sealed model.

    Raises `ResplitError`: MISSING_KEYS where they are not here, CORRUPT_FILE where the file is not what was written.
    """
    path = store.keys_folder / model
    try:
        found = codec.decode(ModelKeys, path.read_bytes(), "keys")
    except OSError as error:
        message = (
            f"model {model} is sealed, and its keys cannot be read: {error}; bring {path} from where it was sealed"
        )
        raise ResplitError(ErrorCode.MISSING_KEYS, message, "model") from error
    except ResplitError as error:
        message = f"{path} does not hold keys: {error.message}; bring it again from where the model was sealed"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message) from error
    if found.model != model:
        message = f"{path} holds the keys of model {found.model}; bring it again from where the model was sealed"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message)
    return found


def stored_keys(store: Store, model: Digest) -> KeyOf:
    """The keys beside `store`, read when the first one is asked for: a model in the open needs none."""
    return lambda block: read_keys(store, model).key(block)


def write_keys(store: Store, keys: ModelKeys) -> None:
    """Keep the keys of a sealed model. When this returns they survive a loss of power."""
    folder = store.keys_folder
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / keys.model
    temporary = folder / f".{keys.model}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    # Created with the mode it keeps: a secret is never readable by others, not even while it is written.
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:  # noqa: PTH123
        file.write(codec.encode(keys))
        publish(file, temporary, path)

"""The blocks of a model, opened for ONNX Runtime: in the store where they lie in the open, in memory where sealed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from models.keyring import KeyOf
from models.sealing import FileContext
from models.session import note_verified, stamp_of, verified_graph
from models.store import Store
from models.unsealed import memory_folder, unseal
from schemas.base import Digest
from schemas.manifest import Block, Manifest


@contextmanager
def opened(
    store: Store, manifest: Manifest, blocks: Sequence[Block], key_of: KeyOf
) -> Iterator[tuple[list[bytes], Path]]:
    """The graphs of `blocks` and the folder in which ONNX Runtime finds their weights, every byte verified.

    Those of a sealed model are opened with their keys into a folder in memory, which is gone on leaving: sessions are
    to be made before that. Raises what `verified_graph` and `unseal` raise, and what `key_of` does.
    """
    if not manifest.is_sealed:
        yield [verified_graph(store, block) for block in blocks], store.blobs_folder
        return
    model = manifest.unsealed.digest
    with memory_folder() as folder:
        for block in blocks:
            _unseal(store, model, block, key_of(block.index), folder)
        yield [(folder / block.graph.digest).read_bytes() for block in blocks], folder


def _unseal(store: Store, model: Digest, block: Block, key: bytes, folder: Path) -> None:
    for plain, sealed in zip(block.files, block.stored, strict=True):
        stamp = stamp_of(store, sealed)
        if unseal(store.path(sealed.digest), folder, key, FileContext(model, block.index, plain.digest)):
            note_verified(stamp)  # who only looks whether it is there need not hash it

"""Whether a model lies in the open where it must not: looked for in every file, by what is typical of its own."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from models.store import Store
from schemas.manifest import Block

WINDOW_BYTES = 32
DISTINCT_MIN = 12
"""Bytes that differ in a window: zeros, or one value over and over, stand in files that have nothing to do with it."""
WINDOWS_MAX = 8
"""Of one file of weights, spread over it."""


def traces(store: Store, blocks: Iterable[Block]) -> dict[bytes, str]:
    """Pieces of the weights of these blocks, and their graphs, each with the digest of the file that it is from."""
    blocks = tuple(blocks)
    weights = {ref.digest for block in blocks for ref in block.weights}
    found: dict[bytes, str] = {
        window: digest for digest in weights for window in _windows(store.path(digest).read_bytes())
    }
    found |= {store.read(block.graph.digest): block.graph.digest for block in blocks}
    return found


def exposed_in(folder: Path, wanted: dict[bytes, str]) -> set[tuple[str, str]]:
    """(file below `folder`, digest of the file of which it holds a trace)."""
    found = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # a running process removed it meanwhile
            continue
        found |= {(str(path.relative_to(folder)), source) for trace, source in wanted.items() if trace in data}
    return found


def _windows(data: bytes) -> Iterator[bytes]:
    step = max(WINDOW_BYTES, len(data) // WINDOWS_MAX)
    for start in range(0, len(data) - WINDOW_BYTES + 1, step):
        window = data[start : start + WINDOW_BYTES]
        if len(set(window)) >= DISTINCT_MIN:
            yield window

"""PURE: what the blocks of a model weigh, compute and hand on, worked out once for each manifest."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from profiler.memory import weight_memory_bytes
from profiler.network import boundary_bytes
from schemas.manifest import Block, Manifest
from schemas.tensor import Array

MODELS_KEPT = 32
"""Manifests whose sizes are remembered."""


@dataclass(frozen=True)
class Sizes:
    """One entry for each block of a model, in order."""

    weight_bytes: tuple[int, ...]
    loaded_bytes: tuple[int, ...]
    """What a node must have free to load it, before any cache (`profiler.memory.weight_memory_bytes`)."""
    adapter_bytes: tuple[int, ...]
    """Of that: what a variant has for itself, where others share its base."""
    kv_bytes_per_token: tuple[int, ...]
    boundary_bytes: tuple[int, ...]
    """a_b of mathematics.md A1 (`profiler.network.boundary_bytes`)."""
    kinds: tuple[int, ...]
    """The first block that is like it: layers of a model differ by their weights' values alone."""
    heads: tuple[int, ...]
    """The blocks that run for the last token of a prompt alone; these are few."""
    flops: Array
    """Of one token, float64."""
    streamed_bytes: Array
    """Of weights that one token reads, float64."""

    @property
    def blocks(self) -> int:
        return len(self.weight_bytes)


def sizes_of(manifest: Manifest) -> Sizes:
    """The sizes of a model, which the same manifest is asked for again and again."""
    return _sizes(_Same(manifest))


class _Same:
    """A manifest as a key. It is frozen, so that one object is one model; to hash its value would take longer than
    to work its sizes out anew."""

    __slots__ = ("manifest",)

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __hash__(self) -> int:
        return id(self.manifest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.manifest is self.manifest


@lru_cache(MODELS_KEPT)
def _sizes(key: _Same) -> Sizes:
    manifest = key.manifest
    blocks = manifest.blocks
    first: dict[tuple[str, int, int], int] = {}
    return Sizes(
        weight_bytes=tuple(block.weight_bytes for block in blocks),
        loaded_bytes=tuple(map(weight_memory_bytes, blocks)),
        adapter_bytes=tuple(block.adapter_bytes for block in blocks),
        kv_bytes_per_token=tuple(block.kv_bytes_per_token for block in blocks),
        boundary_bytes=tuple(boundary_bytes(manifest, block) for block in range(len(blocks))),
        kinds=tuple(
            first.setdefault((block.role, block.weight_bytes, block.flops_per_token), block.index) for block in blocks
        ),
        heads=tuple(block.index for block in blocks if block.role == "head"),
        flops=np.array([block.flops_per_token for block in blocks], np.float64),
        streamed_bytes=np.array([_streamed_bytes(block) for block in blocks], np.float64),
    )


def _streamed_bytes(block: Block) -> int:
    # A block without multiplications is a table that is looked up: it reads a row, not the table.
    return block.weight_bytes if block.flops_per_token else 0

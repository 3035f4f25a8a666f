"""A model run in stages, each stage one session over merged blocks: what the tests hold against the oracle."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.merge import merge
from models.reference import greedy
from models.session import open_session, verified_graph
from models.store import Store
from schemas.manifest import Block, KvCache, Manifest, SharedRole

Array = npt.NDArray[Any]


class Stages:
    """The blocks of a manifest, cut before the given block indices, one session for each stretch."""

    def __init__(self, store: Store, manifest: Manifest, cuts: list[int]) -> None:
        self.manifest = manifest
        bounds = [0, *cuts, len(manifest.blocks)]
        self.stretches = [manifest.blocks[a:b] for a, b in itertools.pairwise(bounds)]
        self._sessions = [open_stage(store, stretch) for stretch in self.stretches]

    def run(self, given: dict[str, Array]) -> dict[str, Array]:
        """Run every stage in turn; `given` holds all inputs, boundaries are added as they appear."""
        values = dict(given)
        for session in self._sessions:
            names = [output.name for output in session.get_outputs()]
            fed = {item.name: values[item.name] for item in session.get_inputs()}
            values.update(zip(names, session.run(names, fed), strict=True))
        return values


def open_stage(store: Store, blocks: tuple[Block, ...]) -> Any:
    graph = merge([verified_graph(store, block) for block in blocks])
    return open_session(graph, store.blobs_folder, "cpu", 1)


class SplitDecoder(Stages):
    """Greedy generation over stages, with the cache outside the sessions as an agent keeps it."""

    def generate(self, prompt: list[int], max_tokens: int, chunk_tokens: int, context_tokens: int) -> list[int]:
        caches = [cache for block in self.manifest.blocks for cache in block.kv]
        state = {name: array for cache in caches for name, array in _empty(cache, context_tokens)}
        self.logits: list[Array] = []
        produced: list[int] = []
        for start in range(0, len(prompt), chunk_tokens):
            logits = self._step(prompt[start : start + chunk_tokens], start, caches, state)
        while True:
            self.logits.append(logits)
            produced.append(greedy(logits))
            if len(produced) == max_tokens:
                return produced
            logits = self._step(produced[-1:], len(prompt) + len(produced) - 1, caches, state)

    def _step(self, tokens: list[int], past: int, caches: list[KvCache], state: dict[str, Array]) -> Array:
        total = past + len(tokens)
        by_role: dict[SharedRole, Array] = {
            SharedRole.SEQLENS_K: np.array([total - 1], np.int32),
            SharedRole.TOTAL_SEQUENCE_LENGTH: np.array(total, np.int32),
            SharedRole.ATTENTION_MASK: np.ones((1, total), np.int64),
            SharedRole.POSITION_IDS: np.arange(past, total, dtype=np.int64)[None],
        }
        given = {shared.tensor.name: by_role[shared.role] for shared in self.manifest.shared_inputs}
        given[self.manifest.inputs[0].name] = np.array([tokens], np.int64)
        values = self.run(given | state)
        for cache in caches:
            # Without one buffer for both, GroupQueryAttention copies its past into its present first.
            state[cache.past_key], state[cache.past_value] = values[cache.present_key], values[cache.present_value]
        logits: Array = values[self.manifest.outputs[0].name][0, -1]
        return logits


def _empty(cache: KvCache, capacity: int) -> list[tuple[str, Array]]:
    length = capacity if cache.layout == "shared" else 0
    zeros = np.zeros((1, cache.heads, length, cache.head_dim), cache.dtype)
    return [(cache.past_key, zeros), (cache.past_value, zeros)]


def corrupt(path: Path) -> None:
    """Flip the last byte of a file, leaving its size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

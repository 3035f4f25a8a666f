"""The oracle: a model uncut, in one session, that every split is measured against."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from models.providers import Provider
from models.session import open_session, verified_whole
from models.store import Store
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import KvCache, ModelKind

Array = npt.NDArray[Any]
Sampler = Callable[[npt.NDArray[np.float32]], int]
CHUNK_TOKENS = 128


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """The first of the largest logits."""
    return int(np.argmax(logits))


ROWS_PROBES = 16
"""Steps that are compared to tell whether a single row has a kernel of its own; a few may be equal by chance."""


class Reference:
    """One session over `Manifest.whole`."""

    def __init__(
        self,
        store: Store,
        model: Digest | str,
        provider: Provider = "cpu",
        threads: int = 1,
        rows: int | None = None,
    ) -> None:
        """`rows`: equal rows of a decode step; by default as many as make it independent of a batch (`rows_min`)."""
        self.manifest = store.manifest(model)
        graph = verified_whole(store, self.manifest)
        self._session = open_session(graph, store.blobs_folder, provider, threads)
        self._device = provider
        self._inputs = [given.name for given in self._session.get_inputs()]
        self._rows = rows
        self.logits: list[npt.NDArray[np.float32]] = []
        """float32 [vocabulary] at the last position before each token of the last `generate`."""

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """One call of a model without a cache: every input by name in, every output by name out."""
        absent = [name for name in self._inputs if name not in inputs]
        if absent:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"input {absent[0]!r} is missing", absent[0])
        names = [spec.name for spec in self.manifest.outputs]
        values = self._session.run(names, {name: inputs[name] for name in self._inputs})
        return dict(zip(names, values, strict=True))

    def generate(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        chunk_tokens: int = CHUNK_TOKENS,
        context_tokens: int | None = None,
        sampler: Sampler = greedy,
        stop_at_eos: bool = True,
    ) -> list[int]:
        """Generate up to `max_tokens` tokens, batch 1; an end-of-sequence token ends it and is returned.

        The prompt goes in chunks that begin at multiples of `chunk_tokens`, then one token a call, in as many
        equal rows as results need to be independent of the batch (`rows_min`).
        `context_tokens` (the model's context by default) bounds prompt and output together and is the size
        of the cache. Raises CONTEXT_EXCEEDED and INVALID_REQUEST.
        """
        text = self.manifest.text
        if self.manifest.kind is not ModelKind.DECODER or text is None:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"{self.manifest.name} generates no text; use run", "model")
        capacity = context_tokens or text.context_length
        if not prompt_ids or max_tokens < 1:
            raise ResplitError(ErrorCode.INVALID_REQUEST, "generation needs a prompt and at least one token", "prompt")
        if len(prompt_ids) + max_tokens > capacity:
            raise ResplitError(
                ErrorCode.CONTEXT_EXCEEDED,
                f"{len(prompt_ids)} prompt tokens and {max_tokens} new ones exceed the context of {capacity}",
                "max_tokens",
            )
        caches = tuple(cache for block in self.manifest.blocks for cache in block.kv)
        cache = _Cache(caches, capacity, self._device, self.rows_min)
        self.logits = []
        logits = np.zeros(0, np.float32)
        for start in range(0, len(prompt_ids), chunk_tokens):
            chunk = prompt_ids[start : start + chunk_tokens]
            for row in range(cache.rows):
                logits = self._step(chunk, start, cache, range(row, row + 1))
        produced: list[int] = []
        while True:
            self.logits.append(logits)
            produced.append(sampler(logits))
            if len(produced) == max_tokens or (stop_at_eos and produced[-1] in text.eos_token_ids):
                return produced
            logits = self._step(produced[-1:], len(prompt_ids) + len(produced) - 1, cache, range(cache.rows))

    @property
    def rows_min(self) -> int:
        """Rows from which a decode step's results do not depend on the batch: 2 where ONNX Runtime has a kernel
        of its own for a single row (int4 on x86 without AVX-512), else 1. Measured once."""
        if self._rows is None:
            caches = tuple(cache for block in self.manifest.blocks for cache in block.kv)
            self._rows = 1
            if all(cache.layout == "shared" for cache in caches):
                one, two = (_Cache(caches, ROWS_PROBES, self._device, rows) for rows in (1, 2))
                pairs = [
                    (self._step([token], at, one, range(1)), self._step([token], at, two, range(2)))
                    for at, token in enumerate(range(ROWS_PROBES))
                ]
                self._rows = 1 if all(np.array_equal(alone, paired) for alone, paired in pairs) else 2
        return self._rows

    def _step(self, tokens: list[int], past: int, cache: "_Cache", rows: range) -> npt.NDArray[np.float32]:
        """Logits at the last position of the first of `rows`, which all run the same tokens."""
        total = past + len(tokens)
        values = {
            self.manifest.inputs[0].name: np.array([tokens] * len(rows), np.int64),
            "attention_mask": np.ones((len(rows), total), np.int64),
            "position_ids": np.tile(np.arange(past, total, dtype=np.int64), (len(rows), 1)),
        }
        values["cache_position"] = values["position_ids"][0]
        binding = self._session.io_binding()
        for given in self._session.get_inputs():
            if given.name in values:
                wanted = np.int32 if given.type == "tensor(int32)" else np.int64
                binding.bind_cpu_input(given.name, values[given.name].astype(wanted, copy=False))
        binding.bind_output(self.manifest.outputs[0].name, "cpu")
        cache.bind(binding, rows)
        self._session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        cache.keep(presents)
        last: npt.NDArray[np.float32] = np.array(logits.numpy()[0, -1], np.float32)
        return last


class _Cache:
    """Keys and values of one sequence in each row: fixed buffers for `shared`, a tensor that grows for `concat`."""

    def __init__(self, caches: tuple[KvCache, ...], capacity: int, device: str, rows: int) -> None:
        self.rows = rows
        self._caches = caches
        self._device = device
        self.is_shared = all(cache.layout == "shared" for cache in caches)
        length = capacity if self.is_shared else 0
        self._values: dict[str, ort.OrtValue] = {}
        for cache in caches:
            empty = np.zeros((rows, cache.heads, length, cache.head_dim), _numpy_type(cache.dtype))
            for name in (cache.past_key, cache.past_value):
                self._values[name] = ort.OrtValue.ortvalue_from_numpy(empty.copy(), device)

    def bind(self, binding: ort.IOBinding, rows: range) -> None:
        """Give the session its past, and the place for its present: the same rows of a buffer where it is shared."""
        for past, present in self._pairs():
            value = self._values[past]
            if not self.is_shared:
                binding.bind_ortvalue_input(past, value)
                binding.bind_output(present, self._device)
                continue
            shape = (len(rows), *value.shape()[1:])
            pointer = value.data_ptr() + rows.start * (value.tensor_size_in_bytes() // self.rows)
            place = (self._device, 0, value.element_type(), shape, pointer)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def keep(self, presents: list[ort.OrtValue]) -> None:
        """After a call: present becomes past (a shared buffer already is)."""
        if not self.is_shared:
            pairs = zip(self._pairs(), presents, strict=True)
            self._values = {past: present for (past, _), present in pairs}

    def _pairs(self) -> list[tuple[str, str]]:
        keys = [(cache.past_key, cache.present_key) for cache in self._caches]
        return keys + [(cache.past_value, cache.present_value) for cache in self._caches]


def _numpy_type(name: str) -> Any:
    import ml_dtypes  # noqa: PLC0415 (registers bfloat16 with numpy)

    return np.dtype(getattr(ml_dtypes, name, name))

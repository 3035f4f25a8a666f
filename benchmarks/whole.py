"""The unsplit model in one process: ONNX Runtime with IOBinding, or onnxruntime-genai.

Run as a worker (`python -m benchmarks.whole ort|genai FOLDER THREADS`): reads one JSON command a line, answers
with one JSON line. So that each contender has its own process, its own memory and its own thread pool.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from benchmarks.model import NAME
from models.session import open_session, verified_whole
from models.store import Store

CHUNK_TOKENS = 128


class Contender(Protocol):
    """One way to run the whole model."""

    def ttft_s(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""

    def decode(self, sequences: int, prompt: list[int], new_tokens: int) -> float:
        """Tokens per second of `sequences` sequences decoded together, prefill not counted."""


class WholeOrt:
    """The original graph in one session, caches bound in place; greedy by argmax."""

    def __init__(self, folder: Path, threads: int) -> None:
        store = Store(folder / "store")
        manifest = store.manifest(NAME)
        self._session = open_session(verified_whole(store, manifest), store.blobs_folder, "cpu", threads)
        self._kv = [cache for block in manifest.blocks for cache in block.kv]
        self._vocabulary = manifest.text.vocab_size if manifest.text else 0
        self._buffers: dict[str, Any] = {}

    def ttft_s(self, prompt: list[int]) -> float:
        self._reserve(1, 1024)
        started = time.perf_counter()
        self._prefill(0, prompt)
        return time.perf_counter() - started

    def decode(self, sequences: int, prompt: list[int], new_tokens: int) -> float:
        length = len(prompt) + new_tokens
        self._reserve(sequences, length)
        first = [self._prefill(row, prompt) for row in range(sequences)]
        ids = np.asarray(first, np.int64)[:, None]
        mask = np.ones((sequences, length), np.int64)
        binding = self._session.io_binding()
        self._bind_caches(binding, range(sequences))
        logits = np.empty((sequences, 1, self._vocabulary), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        started = time.perf_counter()
        for step in range(new_tokens):
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask[:, : len(prompt) + step + 1]))
            self._session.run_with_iobinding(binding)
            ids = logits[:, 0].argmax(axis=-1)[:, None].astype(np.int64)
        return sequences * new_tokens / (time.perf_counter() - started)

    def _prefill(self, row: int, prompt: list[int]) -> int:
        token = 0
        for start in range(0, len(prompt), CHUNK_TOKENS):
            ids = np.asarray([prompt[start : start + CHUNK_TOKENS]], np.int64)
            binding = self._session.io_binding()
            self._bind_caches(binding, range(row, row + 1))
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", np.ones((1, start + ids.shape[1]), np.int64))
            binding.bind_output("logits", "cpu")
            self._session.run_with_iobinding(binding)
            token = int(binding.get_outputs()[0].numpy()[0, -1].argmax())
        return token

    def _reserve(self, rows: int, length: int) -> None:
        for cache in self._kv:
            for past in (cache.past_key, cache.past_value):
                shape = (rows, cache.heads, length, cache.head_dim)
                if past not in self._buffers or self._buffers[past].shape != shape:
                    self._buffers[past] = np.zeros(shape, cache.dtype)

    def _bind_caches(self, binding: Any, rows: range) -> None:
        for cache in self._kv:
            for past, present in ((cache.past_key, cache.present_key), (cache.past_value, cache.present_value)):
                part = self._buffers[past][rows.start : rows.stop]
                place = ("cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
                binding.bind_input(past, *place)
                binding.bind_output(present, *place)


class WholeGenai:
    """onnxruntime-genai on the same exported graph: its own loop, its own cache, its own sampling."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og  # noqa: PLC0415 - only this contender needs it

        config = og.Config(str(folder / "genai"))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._og = og
        self._model = og.Model(config)

    def ttft_s(self, prompt: list[int]) -> float:
        generator = self._generator(1, len(prompt) + 1)
        started = time.perf_counter()
        generator.append_tokens(np.asarray([prompt], np.int32))
        generator.generate_next_token()
        return time.perf_counter() - started

    def decode(self, sequences: int, prompt: list[int], new_tokens: int) -> float:
        generator = self._generator(sequences, len(prompt) + new_tokens + 1)
        generator.append_tokens(np.asarray([prompt] * sequences, np.int32))
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return sequences * new_tokens / (time.perf_counter() - started)

    def _generator(self, sequences: int, length: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=length, min_length=length, batch_size=sequences, do_sample=False, past_present_share_buffer=True
        )
        return self._og.Generator(self._model, params)


def main() -> None:
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    contender: Contender = WholeOrt(folder, threads) if kind == "ort" else WholeGenai(folder, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("op"):
            case "ttft":
                answer = {"ttft_s": contender.ttft_s(**command)}
            case "decode":
                answer = {"tokens_per_s": contender.decode(**command)}
            case _:
                answer = {"uss_bytes": psutil.Process().memory_full_info().uss}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

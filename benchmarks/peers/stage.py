"""Some blocks of a decoder in one session of ONNX Runtime, one sequence at a time, with nothing around it.

    python stage.py STAGES.json

Imports nothing of Resplit, since the peers' environment runs it as well. Alone it is the model in this process: reads
a command a line, `{"id": 1, "op": "answer", "prompt": [...], "new_tokens": 8}`, and answers in lines of JSON with the
same id: each token as it comes, then `done` or `error`.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnxruntime as ort

CONTEXT_TOKENS = 2048
CHUNK_TOKENS = 128
"""Of a prompt in one call, as Resplit has it."""

Step = Callable[[int, list[int]], tuple[int, int]]
"""The position and ids of tokens to the position after them and the token that follows."""


class Stage:
    """A session over the graph of a stage (`benchmarks.peers.weights.stages_of`), on one thread, caches in place."""

    def __init__(self, described: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", described["weights"])
        graph = Path(described["graph"]).read_bytes()
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._input, self._output, self._shared = described["input"], described["output"], described["shared"]
        self._binding = self._session.io_binding()
        self._binding.bind_output(self._output, "cpu")
        self.logits: Any = None
        """Of the last step, where the head is here."""
        self._caches = []
        for kv in described["kv"]:
            for past, present in ((kv["past_key"], kv["present_key"]), (kv["past_value"], kv["present_value"])):
                cache = np.zeros((1, kv["heads"], CONTEXT_TOKENS, kv["head_dim"]), kv["dtype"])
                place = ("cpu", 0, cache.dtype.type, cache.shape, cache.ctypes.data)
                self._binding.bind_input(past, *place)
                self._binding.bind_output(present, *place)
                self._caches.append(cache)

    def step(self, given: tuple[int, Any]) -> tuple[int, Any]:
        """Ids or activations [1, S, ...] of tokens from a position on: that position and activations, or of the last
        stage the position after them and the token that follows."""
        position, x = given
        after = position + x.shape[1]
        self._binding.bind_cpu_input(self._input, np.ascontiguousarray(x))
        for name, role in self._shared.items():
            value = np.array(after, np.int32) if role == "total_sequence_length" else np.array([after - 1], np.int32)
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output(self._output, "cpu")
        self._session.run_with_iobinding(self._binding)
        y = self._binding.get_outputs()[0].numpy()
        if self._output != "logits":
            return position, y
        self.logits = y[0, -1]
        return after, int(self.logits.argmax())


def answer(step: Step, prompt: list[int], new_tokens: int) -> Iterator[int]:
    """A greedy answer, token by token."""
    position, token = 0, 0
    for start in range(0, len(prompt), CHUNK_TOKENS):
        position, token = step(start, prompt[start : start + CHUNK_TOKENS])
    yield token
    for _ in range(new_tokens - 1):
        position, token = step(position, [token])
        yield token


def margin(stage: Stage, step: Step, prompt: list[int], ids: list[int], other: int) -> dict[str, float]:
    """By how much the token after these is likelier than another one, in logits, and how far logits spread."""
    for _ in answer(step, prompt, 1):
        pass
    for position, token in enumerate(ids, start=len(prompt)):
        step(position, [token])
    return {"margin": float(stage.logits.max() - stage.logits[other]), "spread": float(stage.logits.std())}


def own_output() -> TextIO:
    """Standard output for answers alone: whatever else is printed goes where errors go."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(perform: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], out: TextIO) -> None:
    """Commands from standard input, one after the other, until it ends. SIGUSR1 ends the one under way."""
    given_up = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: given_up.set())
    print(json.dumps({"id": 0, "done": True}), file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        number = command.pop("id")
        given_up.clear()
        try:
            for told in perform(command):
                if given_up.is_set():
                    break
                print(json.dumps({"id": number, **told}), file=out, flush=True)
            last: dict[str, Any] = {"done": True}
        except Exception as error:  # whatever it is, the caller is to hear it
            words = str(error).strip().splitlines() or [""]
            last = {"error": f"{type(error).__name__}: {words[-1]}"}
        print(json.dumps({"id": number, **last}), file=out, flush=True)


def main() -> None:
    out = own_output()
    [described] = json.loads(Path(sys.argv[1]).read_text())
    stage = Stage(described)

    def step(position: int, ids: list[int]) -> tuple[int, int]:
        return stage.step((position, np.array([ids], np.int64)))

    def perform(command: dict[str, Any]) -> Iterator[dict[str, Any]]:
        match command.pop("op"):
            case "answer":
                for token in answer(step, **command):
                    yield {"token": token}
            case "margin":
                yield margin(stage, step, **command)

    serve(perform, out)


if __name__ == "__main__":
    main()

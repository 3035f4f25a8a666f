"""The multimodal pipeline of `docs/examples/assistant.toml`: small models for its services, and all of it composed in
one process."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from agent.tensors import pool, text_inputs
from models.importer import import_model
from models.reference import Reference
from models.store import Store
from models.text import Text
from schemas.tensor import Array

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PIPELINE = EXAMPLES / "assistant.toml"
SERVICES = ("vision", "projection", "fusion", "answer", "classes", "controls")
CHUNK_TOKENS, CONTEXT_TOKENS = 128, 256


def import_assistant(folder: Path, store: Store) -> None:
    """The models of the services into a store that has `minilm` and `llama`, and the pipeline as `assistant`."""
    subprocess.run([sys.executable, EXAMPLES / "assistant_models.py", folder], check=True, capture_output=True)
    for name in SERVICES:
        import_model(str(folder / f"{name}.onnx"), store, name)
    import_model(str(PIPELINE), store)


class Composed:
    """The services one after another in this process, each model unsplit."""

    def __init__(self, store: Store) -> None:
        self._models = {name: Reference(store, name) for name in ("vision", "minilm", "llama", *SERVICES)}
        spec = self._models["minilm"].manifest.text
        assert spec is not None
        self._text = Text(spec, store.path(spec.tokenizer.digest))

    def features(self, image: Array) -> Array:
        return self._models["vision"].run({"image": image})["features"]

    def meaning(self, text: str) -> Array:
        manifest = self._models["minilm"].manifest
        output = self._models["minilm"].run(text_inputs(self._text, manifest, text, "text"))
        return pool(output[manifest.outputs[0].name], manifest)[None, :].astype(np.float32)

    def fused(self, image: Array, text: str) -> Array:
        both = {"features": self.features(image), "meaning": self.meaning(text)}
        return self._models["fusion"].run(both)["fused"]

    def tokens(self, image: Array, text: str, count: int) -> list[int]:
        both = {"features": self.features(image), "meaning": self.meaning(text)}
        prompt = self._models["projection"].run(both)["tokens"][0].tolist()
        return self._models["llama"].generate(prompt, count, CHUNK_TOKENS, CONTEXT_TOKENS)

    def answer(self, image: Array, text: str) -> Array:
        return self._models["answer"].run({"fused": self.fused(image, text)})["scores"]

    def classes(self, image: Array) -> Array:
        return self._models["classes"].run({"features": self.features(image)})["scores"]

    def controls(self, image: Array, text: str) -> Array:
        return self._models["controls"].run({"fused": self.fused(image, text)})["scores"]


def image(seed: int) -> Array:
    """A picture of nothing."""
    return np.random.default_rng(seed).normal(size=(1, 3, 32, 32)).astype(np.float32)

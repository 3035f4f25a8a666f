"""The benchmark's model as each system takes it: blocks in a store, one GGUF file, graphs of halves for Ray."""

import json
import subprocess
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto, TensorProto, helper

from benchmarks.model import Precision, bench_model
from models.merge import merge
from models.store import Store
from schemas.manifest import Block, Manifest

WRITER = Path(__file__).with_name("gguf_file.py")
WHOLE: Literal["whole"] = "whole"
SPLIT: Literal["split"] = "split"


def gguf_of(folder: Path, precision: Precision, python: Path) -> Path:
    """The model as GGUF, written by the peers' Python from the weights that the store has; made once."""
    path = folder / "gguf" / f"{precision}.gguf"
    if path.exists():
        return path
    store, digest, _ = bench_model(folder, precision)
    manifest = store.manifest(digest)
    config = json.loads((folder / "hf" / "config.json").read_text())
    described = {
        "name": manifest.name,
        "config": config,
        "rope_theta": (config.get("rope_parameters") or config)["rope_theta"],
        "tensors": _tensors(store, manifest),
    }
    path.parent.mkdir(exist_ok=True)
    told, partial = path.with_suffix(".json"), path.with_suffix(".partial")
    told.write_text(json.dumps(described))
    subprocess.run([python, WRITER, told, partial], check=True)
    partial.rename(path)
    told.unlink()
    return path


def weight_bytes(folder: Path, precision: Precision) -> int:
    """Of the whole model."""
    store, digest, _ = bench_model(folder, precision)
    return sum(block.weight_bytes for block in store.manifest(digest).blocks)


def layers(folder: Path) -> int:
    """How many the model has, without the embedding and the head."""
    store, digest, _ = bench_model(folder)
    return len(store.manifest(digest).blocks) - 2


def stages_of(store: Store, manifest: Manifest, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The graphs of the whole model and of its halves, written to `out`, and what an actor has to know of each.

    They are the blocks of the store, those of a half merged into one graph: what one session runs fastest.
    """
    blocks = manifest.blocks
    middle = len(blocks) // 2
    cuts = {WHOLE: [blocks], SPLIT: [blocks[:middle], blocks[middle:]]}
    return {
        name: [_stage(store, manifest, stage, out / f"{name}-{i}.onnx") for i, stage in enumerate(stages)]
        for name, stages in cuts.items()
    }


def _stage(store: Store, manifest: Manifest, blocks: tuple[Block, ...], path: Path) -> dict[str, Any]:
    path.write_bytes(merge([store.read(block.graph.digest) for block in blocks]))
    first, last = blocks[0].input, blocks[-1].output
    read = {name for block in blocks for name in block.shared}
    return {
        "graph": str(path),
        "weights": str(store.blobs_folder),
        "input": manifest.inputs[0].name if first is None else first.name,
        "output": manifest.outputs[0].name if last is None else last.name,
        "shared": {given.tensor.name: given.role for given in manifest.shared_inputs if given.tensor.name in read},
        "kv": [cache.model_dump() for block in blocks for cache in block.kv],
    }


def _tensors(store: Store, manifest: Manifest) -> dict[str, tuple[str, str, list[int]]]:
    """File, type and shape of each weight, by its name in the graph."""
    graph = ModelProto.FromString(store.read(manifest.whole.digest)).graph
    return {tensor.name: _described(store, tensor) for tensor in graph.initializer if tensor.external_data}


def _described(store: Store, tensor: TensorProto) -> tuple[str, str, list[int]]:
    [location] = [entry.value for entry in tensor.external_data if entry.key == "location"]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return str(store.blobs_folder / location), str(dtype), list(tensor.dims)

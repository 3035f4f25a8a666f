"""Variants of a model: one base whose blocks take an adapter as an input, and many adapters.

The graph of a block is rewritten so that each of its linear layers y = x W becomes y + (x A) B, where A and B are
inputs of the graph, of rank 0 unless somebody feeds them. All variants of a base have the same graphs over the same
weights, so they are the same files in a store and one session in an agent; what is a variant's own is a small file of
matrices for each block.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from safetensors.numpy import load, save

from models.adapters import Adapter, Delta, read_adapter
from models.graph import attribute, dtype_name
from models.store import Store
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, KvCache, Manifest, ModelKind
from schemas.tensor import Array

LINEAR = re.compile(r"(?:^|/)layers\.(\d+)/(?:attn|self_attn|mlp)/(\w+_proj)/MatMul(?:_Q\d+)?$")
"""The name that the model builder gives a linear layer's node."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that a graph may have as one, in the order of their columns."""


@dataclass(frozen=True)
class _Linear:
    """One linear layer of a graph: y of width `columns` from x of width `rows`."""

    node: NodeProto
    layer: int
    projection: str
    rows: int
    columns: int
    element: int
    """ONNX's type of what it computes on."""

    @property
    def names(self) -> tuple[str, str]:
        """Of the inputs A and B."""
        made = self.node.output[0]
        return f"{made}.lora_A", f"{made}.lora_B"


def import_variant(base: str, source: str | None, store: Store, name: str) -> tuple[str, Digest]:
    """Lay the adapter in the folder `source` over the model `base` and name the result; without `source`, the base
    itself in the form that shares its blocks with its variants. Returns the name and the manifest's digest.

    Raises what `read_adapter` does; UNSUPPORTED_MODEL for a base that is sealed, is no decoder or whose linear layers
    cannot be told, and where the adapter is for other layers or sizes.
    """
    manifest = store.manifest(base)
    _check_base(manifest)
    adapter = Adapter("", {}) if source is None else read_adapter(Path(source).expanduser())
    with store.importing():
        used: set[tuple[int, str]] = set()
        blocks = tuple(_variant_of(block, adapter, store, used) for block in manifest.blocks)
        if unused := sorted(adapter.deltas.keys() - used):
            layer, projection = unused[0]
            message = f"the adapter is for {projection} of layer {layer}, which {manifest.name} does not have"
            raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, "source")
        whole = ModelProto.FromString(store.read(manifest.whole.digest))
        caches = {cache.past_key: cache for block in manifest.blocks for cache in block.kv}
        fed = _rewrite(whole, adapter, tuple(caches.values()), set())
        variant = manifest.model_copy(
            update={
                "name": name,
                "source": f"{manifest.name} with {f'LoRA {adapter.name}' if source else 'room for LoRA'}",
                "blocks": blocks,
                "whole": store.put(_constant(whole, fed).SerializeToString(deterministic=True)),
            }
        )
        digest = store.save_manifest(variant)
        store.name(name, digest)
    return name, digest


def read_inputs(data: bytes) -> dict[str, Array]:
    """What an adapter's file feeds a block's graph, by the names of its inputs. The bytes must have been verified."""
    found: dict[str, Array] = load(data)
    return found


def _check_base(manifest: Manifest) -> None:
    if manifest.kind is not ModelKind.DECODER:
        raise _refused(f"{manifest.name} is no decoder; adapters are laid over decoders", "base")
    if manifest.is_sealed:
        raise _refused(f"{manifest.name} is sealed; lay the adapter over the model in the open, then seal that", "base")
    if any(block.adapter is not None for block in manifest.blocks):
        raise _refused(f"{manifest.name} has an adapter already; lay this one over the same base", "base")


def _variant_of(block: Block, adapter: Adapter, store: Store, used: set[tuple[int, str]]) -> Block:
    model = ModelProto.FromString(store.read(block.graph.digest))
    fed = _rewrite(model, adapter, block.kv, used)
    if not fed:
        if block.role == "layer":
            message = "a layer has no linear node that is named as onnxruntime-genai's model builder names them"
            raise _refused(f"{message}; import the base from its Hugging Face folder", "base")
        return block
    own = {name: values for name, values in fed.items() if values.size}
    ref: BlobRef | None = store.put(save(own)) if own else None
    multiplied = sum(values.size for values in own.values())
    return block.model_copy(
        update={
            "graph": store.put(model.SerializeToString(deterministic=True)),
            "adapter": ref,
            "flops_per_token": block.flops_per_token + 2 * multiplied,
        }
    )


def _rewrite(
    model: ModelProto, adapter: Adapter, caches: Sequence[KvCache], used: set[tuple[int, str]]
) -> dict[str, Array]:
    """Give each linear layer of a graph its inputs, and tell what this adapter feeds them: rank 0 where nothing."""
    graph = model.graph
    shapes = {tensor.name: tensor for tensor in graph.initializer}
    fed: dict[str, Array] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if (linear := _linear(node, shapes)) is None:
            continue
        down, up = _fed(linear, adapter, caches, used)
        made = node.output[0]
        node.output[0] = f"{made}.base"
        nodes += [
            helper.make_node("MatMul", [node.input[0], linear.names[0]], [f"{made}.low"], name=f"{node.name}/lora_A"),
            helper.make_node("MatMul", [f"{made}.low", linear.names[1]], [f"{made}.delta"], name=f"{node.name}/lora_B"),
            helper.make_node("Add", [f"{made}.base", f"{made}.delta"], [made], name=f"{node.name}/lora"),
        ]
        kind = np.dtype(dtype_name(linear.element))
        for name, values, shape in (
            (linear.names[0], down, (linear.rows, f"{made}.rank")),
            (linear.names[1], up, (f"{made}.rank", linear.columns)),
        ):
            fed[name] = np.ascontiguousarray(values, kind)
            empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], kind)
            graph.initializer.append(numpy_helper.from_array(empty, name))
            graph.input.append(helper.make_tensor_value_info(name, linear.element, shape))
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return fed


def _linear(node: NodeProto, shapes: Mapping[str, TensorProto]) -> _Linear | None:
    match = LINEAR.search(node.name)
    if match is None or node.op_type not in ("MatMul", "MatMulNBits"):
        return None
    weight = shapes.get(node.input[1])
    if weight is None:
        return None
    if node.op_type == "MatMul":
        rows, columns, element = int(weight.dims[0]), int(weight.dims[1]), weight.data_type
    else:
        rows, columns = attribute(node, "K", 0), attribute(node, "N", 0)
        element = shapes[node.input[2]].data_type
    return _Linear(node, int(match[1]), match[2], rows, columns, element)


def _fed(
    linear: _Linear, adapter: Adapter, caches: Sequence[KvCache], used: set[tuple[int, str]]
) -> tuple[Array, Array]:
    """A and B for one linear layer: of a fused one, those of its parts side by side, each over its own columns."""
    parts = FUSED.get(linear.projection, (linear.projection,))
    whole = adapter.deltas.get((linear.layer, linear.projection))
    widths = (linear.columns,) if whole is not None else _widths(linear, parts, caches)
    named = (linear.projection,) if whole is not None else parts
    downs, ups, start = [np.zeros((linear.rows, 0), np.float32)], [np.zeros((0, linear.columns), np.float32)], 0
    for projection, width in zip(named, widths, strict=True):
        delta = adapter.deltas.get((linear.layer, projection))
        if delta is not None:
            _check_sizes(linear, projection, delta, width)
            used.add((linear.layer, projection))
            downs.append(delta.down)
            over = np.zeros((delta.up.shape[0], linear.columns), np.float32)
            over[:, start : start + width] = delta.up
            ups.append(over)
        start += width
    return np.concatenate(downs, axis=1), np.concatenate(ups, axis=0)


def _widths(linear: _Linear, parts: Sequence[str], caches: Sequence[KvCache]) -> tuple[int, ...]:
    """How many columns of a linear layer each of its parts has."""
    if len(parts) == 1:
        return (linear.columns,)
    if linear.projection == "qkv_proj":
        kept = caches[0].heads * caches[0].head_dim if caches else linear.columns // 3
        return (linear.columns - 2 * kept, kept, kept)
    return tuple(linear.columns // len(parts) for _ in parts)


def _check_sizes(linear: _Linear, projection: str, delta: Delta, width: int) -> None:
    found, wanted = (delta.down.shape[0], delta.up.shape[1]), (linear.rows, width)
    if found != wanted:
        message = f"{projection} of layer {linear.layer} goes from {wanted[0]} to {wanted[1]} numbers"
        raise _refused(f"{message}, in the adapter from {found[0]} to {found[1]}; it is for another model", "source")


def _constant(model: ModelProto, fed: Mapping[str, Array]) -> ModelProto:
    """The same graph with what is fed as constants."""
    graph = model.graph
    inputs = [value for value in graph.input if value.name not in fed]
    constants = [tensor for tensor in graph.initializer if tensor.name not in fed]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(inputs)
    graph.initializer.extend([*constants, *(numpy_helper.from_array(values, name) for name, values in fed.items())])
    return model


def _refused(message: str, field: str) -> ResplitError:
    return ResplitError(ErrorCode.UNSUPPORTED_MODEL, message, field)

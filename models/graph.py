"""An ONNX graph without its weights, read so that it can be reasoned about.

`read_model` brings any file into one normal form: no local functions, no constants among the inputs,
nodes in topological order, every name produced before it is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Dimension, TensorSpec

Dims = tuple[Dimension, ...]


@dataclass(frozen=True)
class TensorType:
    """The ONNX element type of a tensor and its shape; a dimension nobody named or fixed is `?`."""

    element: int
    shape: Dims

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype_name(self.element), shape=self.shape)


def read_model(path: Path) -> ModelProto:
    """Read a graph, not its external data. Raises UNSUPPORTED_MODEL or CORRUPT_FILE, naming the file."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ResplitError(
            ErrorCode.INVALID_REQUEST, f"{path} does not exist; give a .onnx file or a model folder", "source"
        ) from error
    except Exception as error:
        # The protobuf runtimes share no base class for "these bytes are not a message".
        raise corrupt(path, str(error) or type(error).__name__) from error
    if not model.graph.node or not model.graph.output:
        raise corrupt(path, "it holds no graph")
    if model.functions:
        from onnx import inliner  # noqa: PLC0415 (few files have local functions)

        model = inliner.inline_local_functions(model)
    graph = model.graph
    if graph.sparse_initializer:
        raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, f"{path} has sparse weights; export it with dense ones")
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    given = constants | {value.name for value in inputs}
    try:
        nodes = sort_nodes(graph.node, given)
    except ValueError as error:
        raise corrupt(path, str(error)) from error
    del graph.node[:]
    graph.node.extend(nodes)
    _strip_remarks(model)
    produced = given | {name for node in nodes for name in node.output}
    for value in graph.output:
        if value.name not in produced:
            raise corrupt(path, f"nothing produces its output {value.name!r}")
    return model


def _strip_remarks(model: ModelProto) -> None:
    """Drop what exporters write for people: stack traces and file paths, most of the bytes of some graphs."""
    del model.metadata_props[:]
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def corrupt(path: Path, reason: str) -> ResplitError:
    """The error for a file that is not what its name promises."""
    return ResplitError(
        ErrorCode.CORRUPT_FILE, f"{path} is not a readable ONNX model ({reason}); copy or export it again", "source"
    )


def sort_nodes(nodes: Sequence[NodeProto], given: Iterable[str]) -> list[NodeProto]:
    """The nodes in topological order, keeping the given order where it is one already.

    Raises ValueError on a cycle, on a name produced twice and on a name that nothing produces.
    """
    known = set(given)
    producers: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in node.output:
            if name and (name in producers or name in known):
                raise ValueError(f"{name!r} is produced twice")
            producers[name] = i
    in_order = True
    above: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        above[i] = []
        for name in reads_of(node):
            if name in known:
                continue
            if name not in producers:
                raise ValueError(f"nothing produces {name!r}, which node {node.name!r} reads")
            above[i].append(producers[name])
            in_order = in_order and producers[name] < i
    if in_order:
        return list(nodes)
    try:
        return [nodes[i] for i in TopologicalSorter(above).static_order()]
    except CycleError as error:
        raise ValueError("its nodes form a cycle") from error


def reads_of(node: NodeProto) -> list[str]:
    """Every tensor a node reads, those its subgraphs capture from outside included, once each."""
    found = dict.fromkeys(name for name in node.input if name)
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            found.update(dict.fromkeys(_captures(graph)))
    return list(found)


def _captures(graph: GraphProto) -> list[str]:
    inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    captured: list[str] = []
    for node in graph.node:
        captured.extend(name for name in reads_of(node) if name not in inside)
        inside.update(node.output)
    return captured + [value.name for value in graph.output if value.name not in inside]


def tensor_types(model: ModelProto) -> dict[str, TensorType]:
    """What the file says of its tensors, completed by ONNX shape inference where it says too little."""
    found = _declared_types(model.graph)
    if any(name and name not in found for node in model.graph.node for name in node.output):
        try:
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except Exception:
            # Inference is a help, not a judge: what it cannot do, ONNX Runtime often can.
            return found
        found = {**_declared_types(inferred.graph), **found}
    return found


def _declared_types(graph: GraphProto) -> dict[str, TensorType]:
    found = {tensor.name: TensorType(tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type and kind.HasField("shape"):
            dims = (d.dim_param or "?" if not d.HasField("dim_value") else d.dim_value for d in kind.shape.dim)
            found[value.name] = TensorType(kind.elem_type, tuple(dims))
    return found


def value_info(spec: TensorSpec) -> ValueInfoProto:
    """The ONNX declaration of a tensor; `?` becomes a dimension without a name."""
    element = helper.np_dtype_to_tensor_dtype(_numpy_dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, element, [None if d == "?" else d for d in spec.shape])


def dtype_name(element: int) -> str:
    """numpy's name (ml_dtypes' where numpy has none) of an ONNX element type."""
    if element == TensorProto.STRING:
        return "str"
    return str(helper.tensor_dtype_to_np_dtype(element).name)


def _numpy_dtype(name: str) -> Any:
    import ml_dtypes  # noqa: PLC0415 (registers bfloat16 and the small types with numpy)
    import numpy as np  # noqa: PLC0415

    return np.dtype(getattr(ml_dtypes, name, name)) if name != "str" else np.dtype(object)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default the operator's specification gives."""
    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def opset(model: ModelProto) -> int:
    """The version of the standard operator set that the model imports."""
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=1)

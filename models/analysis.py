"""Which nodes of a graph are its body, and which are helpers that any block may compute again.

A helper depends only on constants, on control inputs (masks, positions, lengths) and on shapes. What is
left, in order, is the body: the line of computation that a cut divides.
"""

from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from models.graph import Dims, TensorType, attribute, reads_of, tensor_types
from models.interface import Interface, read_interface
from models.residual import Group, split_residuals

# Random operators give another value each time they run, so no block may run them again.
UNREPEATABLE = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"})
# ONNX Runtime fuses these into the operator before them, which it can only do inside one block.
FUSED_INTO_PRODUCER = frozenset(
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu", "BatchNormalization", "Mul"}
)


@dataclass(frozen=True)
class Analysis:
    """A graph taken apart.

    `body[i]` are the nodes no cut separates, in order; `helpers` maps each tensor that may be recomputed
    to the node that does it; `positions` are the indices into `body` before which exactly one tensor is
    alive, each with that tensor's name.
    """

    model: ModelProto
    types: dict[str, TensorType]
    interface: Interface
    body: tuple[Group, ...]
    helpers: dict[str, NodeProto]
    positions: dict[int, str]


def analyse(model: ModelProto) -> Analysis:
    """Take a graph in normal form (`models.graph.read_model`) apart."""
    types = tensor_types(model)
    interface = read_interface(model, types)
    repeatable = {tensor.name for tensor in model.graph.initializer} | set(interface.control)
    body: list[Group] = []
    helpers: dict[str, NodeProto] = {}
    for group in split_residuals(model.graph.node):
        node = group[-1]
        if node.output[0] in interface.promoted:
            continue
        if len(group) == 1 and node.op_type not in UNREPEATABLE and _is_helper(node, repeatable, types):
            helpers.update((name, node) for name in node.output if name)
            repeatable.update(name for name in node.output if name)
        else:
            body.append(group)
    declare_sums(body, types)
    return Analysis(model, types, interface, tuple(body), helpers, _positions(body, interface, types))


def shape_dims(node: NodeProto, types: dict[str, TensorType]) -> Dims | None:
    """The dimensions a `Shape` node returns, by name, or None where it is no Shape or one has no name."""
    kind = types.get(node.input[0]) if node.op_type == "Shape" else None
    if kind is None:
        return None
    dims = kind.shape[attribute(node, "start", 0) : attribute(node, "end", len(kind.shape))]
    return None if "?" in dims else dims


def group_reads(group: Group) -> list[str]:
    """The tensors a group reads from outside itself, once each."""
    own = {name for node in group for name in node.output}
    return list(dict.fromkeys(name for node in group for name in reads_of(node) if name not in own))


def group_writes(group: Group) -> list[str]:
    return [name for node in group for name in node.output if name]


def _is_helper(node: NodeProto, repeatable: set[str], types: dict[str, TensorType]) -> bool:
    reads = reads_of(node)
    return all(name in repeatable for name in reads) or shape_dims(node, types) is not None


def declare_sums(body: list[Group], types: dict[str, TensorType]) -> None:
    """Give the sum of a split skip-normalisation, which the file may not mention, the type of its addends."""
    for group in body:
        node = group[-1]
        if node.op_type == "Add" and node.output[0] not in types:
            left = types.get(node.input[0]) or types.get(node.input[1])
            if left is not None:
                types[node.output[0]] = left


def _positions(body: list[Group], interface: Interface, types: dict[str, TensorType]) -> dict[int, str]:
    last_read: dict[str, int] = {}
    readers: dict[str, int] = {}
    for i, group in enumerate(body):
        for name in group_reads(group):
            last_read[name] = i
            readers[name] = readers.get(name, 0) + 1
    alive = {name for name in interface.data if name in last_read}
    found: dict[int, str] = {}
    for i, group in enumerate(body[:-1]):
        alive.update(name for name in group_writes(group) if last_read.get(name, -1) > i)
        alive -= {name for name in alive if last_read[name] <= i}
        if len(alive) != 1:
            continue
        (name,) = alive
        fused = readers[name] == 1 and body[i + 1][-1].op_type in FUSED_INTO_PRODUCER
        if name not in interface.data and name in types and not fused:
            found[i + 1] = name
    return found

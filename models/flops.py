"""Roughly how much arithmetic a node does, for planning: multiply-adds times two, for one token.

A symbolic dimension (batch, sequence) counts as one, so a text model's figure is per token and an
image model's per item. Attention scores grow with the context and are counted for `SPAN` tokens of it.
"""

from math import prod

from onnx import NodeProto

from models.graph import TensorType, attribute
from models.interface import ATTENTION_PASTS

SPAN = 256


def node_flops(node: NodeProto, types: dict[str, TensorType], constants: set[str]) -> int:
    """Multiply-adds times two; 0 for operators that are not worth counting, or whose shapes are not known."""
    match node.op_type:
        case "MatMulNBits":
            rows = _size(types, node.output[0]) // max(1, int(attribute(node, "N", 1)))
            return 2 * max(1, rows) * int(attribute(node, "K", 0)) * int(attribute(node, "N", 0))
        case "MatMul" | "Gemm" | "MatMulInteger" | "QLinearMatMul" | "FusedMatMul":
            return _matmul(node, types, constants)
        case "Conv" | "ConvTranspose" | "FusedConv" | "ConvInteger" | "QLinearConv":
            weight = types.get(node.input[3] if node.op_type == "QLinearConv" else node.input[1])
            if weight is None:
                return 0
            per_output = prod(d for d in weight.shape[1:] if isinstance(d, int))
            return 2 * _size(types, node.output[0]) * per_output
        case op if op in ATTENTION_PASTS:
            return 4 * SPAN * _size(types, node.output[0])
        case _:
            return 0


def _matmul(node: NodeProto, types: dict[str, TensorType], constants: set[str]) -> int:
    right = types.get(node.input[3] if node.op_type == "QLinearMatMul" else node.input[1])
    if right is None or len(right.shape) < 2:
        return 0
    if node.input[1] in constants:
        transposed = bool(attribute(node, "transB", 0))
        width, depth = (right.shape[-2], right.shape[-1]) if transposed else (right.shape[-1], right.shape[-2])
        rows = _size(types, node.output[0]) // _int(width) if node.output[0] in types else 1
        return 2 * max(1, rows) * _int(depth) * _int(width)
    # Scores against keys or a sum over values: one side of the product is as long as the context.
    symbolic = isinstance(right.shape[-1], str) or isinstance(right.shape[-2], str)
    return 2 * _size(types, node.output[0]) * _int(right.shape[-2]) * (SPAN if symbolic else 1)


def _size(types: dict[str, TensorType], name: str) -> int:
    """Elements of a tensor with every symbolic dimension as one."""
    kind = types.get(name)
    return 1 if kind is None else prod(d for d in kind.shape if isinstance(d, int))


def _int(dimension: int | str) -> int:
    return dimension if isinstance(dimension, int) else 1

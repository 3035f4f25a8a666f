"""Skip-normalisations taken apart for cutting, and put together again wherever they were not cut.

The fused operators compute `sum = input + skip` and `normalised = norm(sum)`; the sum is the one tensor
that lives between two layers, so a cut must go through the middle of them. The half after the cut keeps
the original operator with a zero skip: the plain normalisation runs another kernel, with other bits.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from onnx import NodeProto, helper

# Operator -> the input that holds its optional bias, which the split does not carry over.
SKIP_NORMS = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 4}
SUM_OUTPUT = 3


Group = tuple[NodeProto, ...]
"""Nodes that no cut separates; the last one says what the group computes."""


def split_residuals(nodes: Iterable[NodeProto]) -> list[Group]:
    """The same computation with every skip-normalisation as an `Add`, then a zero and the normalisation of the sum.

    A skip-normalisation with a bias stays whole: no cut goes through it.
    """
    found: list[Group] = []
    for node in nodes:
        found.extend(_split(node) if _splits(node) else [(node,)])
    return found


def join_residuals(nodes: list[NodeProto], kept: Collection[str]) -> list[NodeProto]:
    """Undo `split_residuals` wherever both halves are present, so that nothing uncut is changed.

    `kept` are the tensor names that must still be produced: boundaries and outputs of the graph.
    """
    producers = {name: node for node in nodes for name in node.output if name}
    reads = Counter(name for node in nodes for name in node.input)
    dropped: set[int] = set()
    joined: dict[int, NodeProto] = {}
    for node in nodes:
        if node.op_type not in SKIP_NORMS:
            continue
        zero = producers.get(node.input[1])
        addition = producers.get(node.input[0])
        if zero is None or addition is None or addition.op_type != "Add" or not _is_zero_of(zero, node.input[0]):
            continue
        total = node.input[0]
        # The zero reads the sum twice and the normalisation once: any other reader needs it as an output.
        others = reads[total] > 3 or total in kept
        whole = NodeProto()
        whole.CopyFrom(node)
        whole.input[0], whole.input[1] = addition.input
        del whole.output[1:]
        if others:
            whole.output.extend(["", "", total])
        joined[id(addition)] = whole
        dropped.update((id(zero), id(node)))
    return [joined.get(id(node), node) for node in nodes if id(node) not in dropped]


def _splits(node: NodeProto) -> bool:
    bias = SKIP_NORMS.get(node.op_type)
    if bias is None or (len(node.input) > bias and node.input[bias]):
        return False
    # Mean and inverse deviation are for training; a graph that reads them is left alone.
    return not any(node.output[1:SUM_OUTPUT])


def _split(node: NodeProto) -> list[Group]:
    has_sum = len(node.output) > SUM_OUTPUT and node.output[SUM_OUTPUT]
    total = node.output[SUM_OUTPUT] if has_sum else f"{node.output[0]}/residual"
    zero = f"{total}/zero"
    norm = NodeProto()
    norm.CopyFrom(node)
    norm.input[0], norm.input[1] = total, zero
    del norm.output[1:]
    return [
        (helper.make_node("Add", list(node.input[:2]), [total], name=f"{total}/add"),),
        (helper.make_node("Sub", [total, total], [zero], name=f"{zero}/sub"), norm),
    ]


def _is_zero_of(node: NodeProto, total: str) -> bool:
    return node.op_type == "Sub" and list(node.input) == [total, total]

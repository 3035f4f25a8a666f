"""Neighbouring blocks as one graph, so that one session can run a whole stage."""

import itertools
from collections.abc import Sequence

from onnx import ModelProto, NodeProto, helper

from models.graph import sort_nodes
from models.residual import join_residuals

KEPT_BOUNDARY = "resplit.kept_boundary"
"""Metadata of a block's graph whose boundary the model also returns: it stays an output when merged."""


def merge(graphs: Sequence[bytes]) -> bytes:
    """One graph that computes what these blocks compute one after the other.

    `graphs` are the stored graphs of consecutive blocks, in order. Blocks repeat helpers under the same
    names, so the union of their nodes by output name is the graph; a skip-normalisation that a boundary
    had divided is whole again. Its inputs are those of all blocks except the boundaries between them; its
    outputs are those of all blocks except the same boundaries, unless the model itself returns one.
    Weights stay outside, by digest. Raises ValueError when the blocks do not follow each other.
    """
    if not graphs:
        raise ValueError("there is nothing to merge")
    if len(graphs) == 1:
        return graphs[0]
    models = [ModelProto.FromString(data) for data in graphs]
    inner = [_boundary(first, second, i) for i, (first, second) in enumerate(itertools.pairwise(models))]
    nodes: list[NodeProto] = []
    made: set[str] = set()
    for model in models:
        for node in model.graph.node:
            if node.output[0] not in made:
                nodes.append(node)
                made.update(node.output)
    inputs = {value.name: value for model in models for value in model.graph.input if value.name not in inner}
    kept = {entry.value for model in models for entry in model.metadata_props if entry.key == KEPT_BOUNDARY}
    hidden = set(inner) - kept
    outputs = {value.name: value for model in models for value in model.graph.output if value.name not in hidden}
    constants = {tensor.name: tensor for model in models for tensor in model.graph.initializer}
    joined = sort_nodes(join_residuals(nodes, outputs), [*inputs, *constants])
    # A boundary is an ordinary tensor now; its declared shape still helps the optimiser.
    known = {v.name: v for model in models for v in (*model.graph.value_info, *model.graph.output)}
    inside = {name for node in joined for name in node.output} - set(outputs)
    graph = helper.make_graph(
        joined,
        f"{models[0].graph.name}..{models[-1].graph.name}",
        list(inputs.values()),
        list(outputs.values()),
        list(constants.values()),
        value_info=[value for name, value in known.items() if name in inside],
    )
    merged = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    merged.producer_name = "resplit"
    if models[-1].metadata_props:
        merged.metadata_props.extend(models[-1].metadata_props)
    return bytes(merged.SerializeToString())


def _boundary(first: ModelProto, second: ModelProto, i: int) -> str:
    """The one tensor that the first block makes and the second takes."""
    made = {value.name for value in first.graph.output}
    shared = [value.name for value in second.graph.input if value.name in made]
    if len(shared) != 1:
        raise ValueError(f"graph {i + 1} does not follow graph {i}: they share {shared or 'no tensor'}")
    return str(shared[0])

"""From a cut to blocks: one self-contained graph for each range of the body, without weights inside."""

from collections.abc import Iterable
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, helper

from models.analysis import Analysis, group_reads, group_writes, shape_dims
from models.cut import Cut, Range, body_flops
from models.graph import Dims, opset, sort_nodes, value_info
from models.merge import KEPT_BOUNDARY
from models.residual import join_residuals
from models.store import Store
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, KvCache, SharedInput, TensorSpec

# `Shape` takes start and end from this version of the standard operators on.
SHAPE_SLICES_SINCE = 15


class CutError(Exception):
    """A range cannot stand alone; the message says what it lacks."""


@dataclass(frozen=True)
class Draft:
    """A block's graph before it is stored, and what it reads and makes."""

    model: ModelProto
    range: Range
    input: TensorSpec | None
    output: TensorSpec | None
    shared: tuple[str, ...]
    outputs: tuple[str, ...]
    kv: tuple[KvCache, ...]
    flops: int


def draft_blocks(analysis: Analysis, cut: Cut) -> list[Draft]:
    """One draft for each range. Raises CutError when a range needs what only another one has."""
    flops = body_flops(analysis)
    drafts = []
    for i, stretch in enumerate(cut.ranges):
        before = _boundary(analysis, stretch.start) if i else None
        last = i == len(cut.ranges) - 1
        after = None if last else _boundary(analysis, stretch.stop)
        drafts.append(_Writer(analysis, stretch, before, after).draft(sum(flops[stretch.start : stretch.stop])))
    return drafts


def store_blocks(drafts: list[Draft], weights: dict[str, BlobRef], store: Store) -> tuple[Block, ...]:
    """Store each draft's graph and describe it for the manifest."""
    blocks = []
    for i, draft in enumerate(drafts):
        used = dict.fromkeys(weights[t.name] for t in draft.model.graph.initializer if t.name in weights)
        blocks.append(
            Block(
                index=i,
                role=draft.range.role,
                graph=store.put(draft.model.SerializeToString(deterministic=True)),
                weights=tuple(used),
                input=draft.input,
                output=draft.output,
                shared=draft.shared,
                outputs=draft.outputs,
                kv=draft.kv,
                flops_per_token=draft.flops,
            )
        )
    return tuple(blocks)


def shared_inputs(analysis: Analysis, drafts: list[Draft]) -> tuple[SharedInput, ...]:
    """The control inputs that at least one block reads, in the graph's order."""
    used = {name for draft in drafts for name in draft.shared}
    control = analysis.interface.control
    return tuple(SharedInput(tensor=_spec(analysis, name), role=role) for name, role in control.items() if name in used)


def _boundary(analysis: Analysis, position: int) -> TensorSpec:
    return _spec(analysis, analysis.positions[position])


def _spec(analysis: Analysis, name: str) -> TensorSpec:
    kind = analysis.types.get(name)
    if kind is None:
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"the file gives no type for {name!r} and inference finds none; save the model with its value_info",
            "source",
        )
    return kind.spec(name)


class _Writer:
    """Collects what one range needs: its nodes, the helpers they read, and the inputs those read."""

    def __init__(self, analysis: Analysis, stretch: Range, before: TensorSpec | None, after: TensorSpec | None) -> None:
        self._analysis = analysis
        self._stretch = stretch
        self._before = before
        self._after = after
        self._body = analysis.body[stretch.start : stretch.stop]
        self._made = {name for group in self._body for name in group_writes(group)}
        reads = {name for group in self._body for name in group_reads(group)}
        self._kv = tuple(
            cache for cache in analysis.interface.kv if cache.past_key in reads or cache.past_value in reads
        )
        # The tensors this block is given, in the order in which its inputs are declared.
        state = [name for cache in self._kv for name in (cache.past_key, cache.past_value)]
        data = [] if before else list(analysis.interface.data)
        self._given = [*([before.name] if before else []), *data, *analysis.interface.control, *state]
        self._constants = {tensor.name: tensor for tensor in analysis.model.graph.initializer}
        self._helpers: dict[str, NodeProto] = {}
        self._read: set[str] = set()

    def draft(self, flops: int) -> Draft:
        interface = self._analysis.interface
        wanted = [name for group in self._body for name in group_reads(group)]
        # A graph output that only helpers make belongs to no range; the last block makes it.
        outputs = [
            name for name in interface.outputs if name in self._made or (self._after is None and self._is_free(name))
        ]
        for name in [*wanted, *outputs]:
            self._need(name)
        presents = [name for cache in self._kv for name in (cache.present_key, cache.present_value)]
        results = list(dict.fromkeys([*([self._after.name] if self._after else []), *outputs, *presents]))
        body = [node for group in self._body for node in group]
        nodes = join_residuals([*_unique(self._helpers.values()), *body], results)
        given = [name for name in self._given if name in self._read]
        if self._before is not None and self._before.name not in self._read:
            raise CutError(f"it does not read {self._before.name!r}, the tensor before it")
        constants = [tensor for name, tensor in self._constants.items() if name in self._read]
        nodes = sort_nodes(nodes, [*given, *(tensor.name for tensor in constants)])
        shared = tuple(name for name in given if name in interface.control)
        return Draft(
            self._model(nodes, given, results, constants),
            self._stretch,
            self._before,
            self._after,
            shared,
            tuple(outputs),
            self._kv,
            flops,
        )

    def _is_free(self, name: str) -> bool:
        return name in self._analysis.helpers or name in self._constants or name in self._analysis.interface.control

    def _need(self, name: str) -> None:
        """Make sure that `name` is there: made by the body, given, constant, or made by a helper added here."""
        if name in self._made or name in self._helpers:
            return
        self._read.add(name)
        if name in self._given or name in self._constants:
            return
        helper_node = self._analysis.helpers.get(name)
        if helper_node is None:
            raise CutError(f"it reads {name!r}, which another block makes")
        self._read.discard(name)
        dims = shape_dims(helper_node, self._analysis.types)
        source = helper_node.input[0] if helper_node.input else ""
        if dims is not None and not self._has(source):
            for node in self._measure(helper_node, dims):
                self._helpers.update((made, node) for made in node.output)
            return
        self._helpers.update((made, helper_node) for made in helper_node.output if made)
        for read in (read for read in helper_node.input if read):
            self._need(read)

    def _has(self, name: str) -> bool:
        """Whether this block can come by `name` without another block."""
        if name in self._made or name in self._given or name in self._constants:
            return True
        node = self._analysis.helpers.get(name)
        if node is None:
            return False
        dims = shape_dims(node, self._analysis.types)
        if dims is not None and self._carrier(dims) is not None:
            return True
        return all(self._has(read) for read in node.input if read)

    def _carrier(self, dims: Dims) -> tuple[str, int] | None:
        """An input of this block with these dimensions next to each other, and where they start."""
        for name in self._given:
            kind = self._analysis.types.get(name)
            shape = kind.shape if kind else ()
            for start in range(len(shape) - len(dims) + 1):
                if shape[start : start + len(dims)] == dims:
                    return name, start
        return None

    def _measure(self, node: NodeProto, dims: Dims) -> list[NodeProto]:
        """Read the same dimensions off a tensor that this block has, instead of off one it has not."""
        if all(isinstance(d, int) for d in dims):
            values = [int(d) for d in dims]
            tensor = helper.make_tensor("value", TensorProto.INT64, [len(values)], values)
            return [helper.make_node("Constant", [], list(node.output), value=tensor)]
        carrier = self._carrier(dims)
        if carrier is None:
            raise CutError(f"it needs the dimensions {list(dims)} of {node.input[0]!r}, which none of its inputs has")
        name, start = carrier
        self._read.add(name)
        return self._slice_of_shape(name, start, len(dims), node.output[0])

    def _slice_of_shape(self, name: str, start: int, count: int, output: str) -> list[NodeProto]:
        if opset(self._analysis.model) >= SHAPE_SLICES_SINCE:
            return [helper.make_node("Shape", [name], [output], start=start, end=start + count)]
        full, first, last = (f"{output}/{part}" for part in ("of", "start", "end"))
        ends = {first: [start], last: [start + count]}
        return [
            helper.make_node("Shape", [name], [full]),
            *(
                helper.make_node("Constant", [], [end], value=helper.make_tensor("value", TensorProto.INT64, [1], at))
                for end, at in ends.items()
            ),
            helper.make_node("Slice", [full, first, last], [output]),
        ]

    def _model(
        self, nodes: list[NodeProto], given: list[str], results: list[str], constants: list[TensorProto]
    ) -> ModelProto:
        source = self._analysis.model
        graph = helper.make_graph(
            nodes,
            f"block-{self._stretch.start}-{self._stretch.stop}",
            [value_info(_spec(self._analysis, name)) for name in given],
            [value_info(_spec(self._analysis, name)) for name in results],
            constants,
        )
        # ONNX Runtime's fusions look at declared shapes, so a block declares what the whole graph did.
        made = {name for node in nodes for name in node.output} - set(results)
        graph.value_info.extend(value for value in source.graph.value_info if value.name in made)
        model = helper.make_model(graph, opset_imports=source.opset_import, ir_version=source.ir_version)
        model.producer_name = "resplit"
        if self._after is not None and self._after.name in self._analysis.interface.outputs:
            # The boundary is also a result of the model; merging must not make it disappear.
            helper.set_model_props(model, {KEPT_BOUNDARY: self._after.name})
        return model


def _unique(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Each node once, by identity: a node with two outputs is filed under both."""
    return list({id(node): node for node in nodes}.values())

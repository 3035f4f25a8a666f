"""What the inputs and outputs of a graph mean: the cache, the control inputs, and the data.

Only operators and the names that the exporters fix for a graph's own inputs are looked at, never the
names of layers or weights.
"""

from dataclasses import dataclass
from typing import Literal

from onnx import ModelProto, NodeProto

from models.graph import TensorType, attribute, dtype_name
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import KvCache, SharedRole

# Operator -> the slots of past key and past value among its inputs; present key and value are outputs 1 and 2.
ATTENTION_PASTS = {"GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7), "Attention": (4, 5)}
GQA_SEQLENS, GQA_TOTAL = 5, 6
ROLES_BY_NAME = {
    "attention_mask": SharedRole.ATTENTION_MASK,
    "position_ids": SharedRole.POSITION_IDS,
    "cache_position": SharedRole.POSITION_IDS,
}
# What may stand between token ids and the table they index without making them anything else.
PASS_THROUGH = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Flatten"})
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True)
class Interface:
    """The graph's inputs and outputs by meaning.

    `data`: what the request supplies and only the first block may see (token ids, an image).
    `control`: name -> role, small inputs every block may read; with a cache this includes tensors inside
    the graph (`promoted`) that stop being computed and become inputs.
    """

    data: tuple[str, ...]
    control: dict[str, SharedRole]
    promoted: frozenset[str]
    kv: tuple[KvCache, ...]
    outputs: tuple[str, ...]

    @property
    def is_decoder(self) -> bool:
        return bool(self.kv)


def read_interface(model: ModelProto, types: dict[str, TensorType]) -> Interface:
    """Sort a graph's inputs and outputs. Raises UNSUPPORTED_MODEL for state that is not an attention cache."""
    kv = _caches(model, types)
    state = {name for cache in kv for name in (cache.past_key, cache.past_value)}
    presents = {name for cache in kv for name in (cache.present_key, cache.present_value)}
    promoted = _promoted(model) if kv else {}
    inputs = [value.name for value in model.graph.input if value.name not in state]
    looked_up = _looked_up(model)
    data: list[str] = []
    control: dict[str, SharedRole] = dict(promoted)
    for name in inputs:
        if kv and name in ROLES_BY_NAME:
            control.setdefault(name, ROLES_BY_NAME[name])
        elif name in promoted:
            continue
        elif _is_data(name, types, looked_up):
            data.append(name)
        elif kv:
            raise ResplitError(
                ErrorCode.UNSUPPORTED_MODEL,
                f"the decoder wants an input {name!r} whose meaning is not known; only token ids, attention_mask, "
                "position_ids and an attention cache are supported",
                "source",
            )
        else:
            control[name] = SharedRole.USER
    if kv and len(data) != 1:
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"a decoder must take token ids and nothing else to compute on; this one takes {data}",
            "source",
        )
    if not data:
        # A graph whose only inputs are integers it computes with: the first is the data.
        data = [name for name in inputs if name not in promoted][:1]
        for name in data:
            del control[name]
    outputs = tuple(value.name for value in model.graph.output if value.name not in presents)
    graph_inputs = {value.name for value in model.graph.input}
    return Interface(tuple(data), control, frozenset(promoted) - graph_inputs, kv, outputs)


def _caches(model: ModelProto, types: dict[str, TensorType]) -> tuple[KvCache, ...]:
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    found: list[KvCache] = []
    appended: list[tuple[str, str]] = []
    widths: dict[str, int | None] = {}
    for node in model.graph.node:
        slots = ATTENTION_PASTS.get(node.op_type)
        if slots is not None and len(node.input) > slots[1] and len(node.output) > 2:
            key, value = node.input[slots[0]], node.input[slots[1]]
            if key in inputs and value in inputs and node.output[1] in outputs and node.output[2] in outputs:
                shared = node.op_type == "GroupQueryAttention"
                pair = ((key, node.output[1]), (value, node.output[2]))
                found.append(_cache("shared" if shared else "concat", pair, types, _head_dim(node, types)))
        elif (
            node.op_type == "Concat" and _appends(node, types) and node.input[0] in inputs and node.output[0] in outputs
        ):
            appended.append((node.input[0], node.output[0]))
            new = types.get(node.input[1])
            widths[node.input[0]] = new.shape[-1] if new and isinstance(new.shape[-1], int) else None
    if appended:
        # Exporters write key and value of a layer next to each other, or all keys before all values;
        # either way the order of use inside the graph pairs them, the key first.
        pairs = zip(appended[::2], appended[1::2], strict=False)
        found += [_cache("concat", pair, types, widths[pair[0][0]]) for pair in pairs]
    order = {value.name: i for i, value in enumerate(model.graph.input)}
    return tuple(sorted(found, key=lambda cache: order[cache.past_key]))


def _appends(node: NodeProto, types: dict[str, TensorType]) -> bool:
    """Whether a Concat adds tokens to a cache: [batch, heads, length, head size], along the length."""
    kind = types.get(node.input[0])
    return kind is not None and len(kind.shape) == 4 and attribute(node, "axis", 0) in (2, -2)


def _cache(
    layout: Literal["shared", "concat"],
    pair: tuple[tuple[str, str], tuple[str, str]],
    types: dict[str, TensorType],
    head_dim: int | None,
) -> KvCache:
    (past_key, present_key), (past_value, present_value) = pair
    kind = types[past_key]
    heads = kind.shape[1] if len(kind.shape) == 4 else None
    width = kind.shape[3] if len(kind.shape) == 4 and isinstance(kind.shape[3], int) else head_dim
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL,
            f"cache input {past_key!r} has shape {list(kind.shape)}; it must be [batch, heads, length, head size] "
            "with heads and head size fixed",
            "source",
        )
    return KvCache(
        layout=layout,
        heads=heads,
        head_dim=width,
        dtype=dtype_name(kind.element),
        past_key=past_key,
        past_value=past_value,
        present_key=present_key,
        present_value=present_value,
    )


def _head_dim(node: NodeProto, types: dict[str, TensorType]) -> int | None:
    """The head size of a GroupQueryAttention whose cache shape leaves it open, from the width of its query."""
    query = types.get(node.input[0])
    if query is None or not isinstance(query.shape[-1], int):
        return None
    heads = int(attribute(node, "num_heads", 0))
    packed = not node.input[1]
    heads += 2 * int(attribute(node, "kv_num_heads", 0)) if packed else 0
    return query.shape[-1] // heads if heads else None


def _promoted(model: ModelProto) -> dict[str, SharedRole]:
    """Lengths that GroupQueryAttention reads: the agent computes them, or a block would need all the masks."""
    found: dict[str, SharedRole] = {}
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            found[node.input[GQA_SEQLENS]] = SharedRole.SEQLENS_K
            found[node.input[GQA_TOTAL]] = SharedRole.TOTAL_SEQUENCE_LENGTH
    return found


def _looked_up(model: ModelProto) -> set[str]:
    """Graph inputs that, possibly cast or reshaped, pick rows of a table: token ids and their like."""
    constants = {tensor.name for tensor in model.graph.initializer}
    origin = {value.name: value.name for value in model.graph.input}
    found: set[str] = set()
    for node in model.graph.node:
        if all(name in constants for name in node.input if name):
            # A table may be computed from a weight: the transposed head, where the two are tied.
            constants.update(node.output)
        elif node.op_type in PASS_THROUGH and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type in LOOKUPS and node.input[0] in constants and node.input[1] in origin:
            found.add(origin[node.input[1]])
    return found


def _is_data(name: str, types: dict[str, TensorType], looked_up: set[str]) -> bool:
    kind = types.get(name)
    if kind is None:
        return True
    if dtype_name(kind.element) in FLOATS:
        return len(kind.shape) > 1
    return name in looked_up and name not in ROLES_BY_NAME

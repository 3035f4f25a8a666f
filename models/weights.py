"""Weights out of a model file and into the store, one blob each.

Afterwards a large initializer is an external-data tensor whose location is the blob's digest, at offset
0 and with its whole length, so ONNX Runtime finds it when given the store's blobs folder.
"""

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from pathlib import Path

from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from models.store import Store
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef

# Below this a constant costs less inside the graph than a file, a hash and an open of its own.
INLINE_BYTES = 1024
TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "raw_data")
HALF_BYTE = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1})


def store_weights(
    model: ModelProto, folder: Path, store: Store, progress: Callable[[int, int], None]
) -> dict[str, BlobRef]:
    """Move every large constant of the model into the store, in place; returns name -> blob.

    `folder` is where the model file lies. Constants inside nodes move too: a `Constant` node with a large
    value becomes an initializer. Raises CORRUPT_FILE when the weight files are missing, too short, or
    named by a path that leaves the folder.
    """
    _lift_constants(model.graph)
    found: dict[str, BlobRef] = {}
    with ExitStack() as files:
        maps: dict[str, mmap.mmap] = {}
        total = len(model.graph.initializer)
        for i, tensor in enumerate(model.graph.initializer):
            if tensor.data_location == TensorProto.EXTERNAL:
                data = _external_bytes(tensor, folder, maps, files)
            elif byte_size(tensor) >= INLINE_BYTES and tensor.data_type != TensorProto.STRING:
                data = memoryview(_inline_bytes(tensor))
            else:
                continue
            if len(data) < INLINE_BYTES:
                _make_inline(tensor, bytes(data))
            else:
                ref = store.put(data)
                _make_external(tensor, ref)
                found[tensor.name] = ref
            data.release()
            progress(i + 1, total)
    _refuse_weights_of_subgraphs(model.graph)
    return found


def byte_size(tensor: TensorProto) -> int:
    """Bytes of the tensor's values by its type and shape, wherever they are."""
    count = int(prod(tensor.dims))
    if tensor.data_type in HALF_BYTE:
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _external_bytes(tensor: TensorProto, folder: Path, maps: dict[str, mmap.mmap], files: ExitStack) -> memoryview:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = (folder / location).resolve()
    if not location or not path.is_relative_to(folder.resolve()):
        raise ResplitError(
            ErrorCode.CORRUPT_FILE, f"weight {tensor.name!r} lies at {location!r}, outside the model's folder", "source"
        )
    if location not in maps:
        try:
            file = files.enter_context(path.open("rb"))
            maps[location] = files.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            message = f"weight {tensor.name!r} should be in {path}, which cannot be read ({error}); copy it again"
            raise ResplitError(ErrorCode.CORRUPT_FILE, message, "source") from error
    size = byte_size(tensor)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size))
    except ValueError as error:
        raise ResplitError(
            ErrorCode.CORRUPT_FILE, f"weight {tensor.name!r} has a malformed offset or length", "source"
        ) from error
    if length != size or offset < 0 or offset + length > len(maps[location]):
        raise ResplitError(
            ErrorCode.CORRUPT_FILE,
            f"weight {tensor.name!r} needs {size} bytes at {offset} of {path.name}, "
            f"which has {len(maps[location])}; the file is truncated, copy it again",
            "source",
        )
    view = memoryview(maps[location])
    files.callback(view.release)
    return view[offset : offset + length]


def _inline_bytes(tensor: TensorProto) -> bytes:
    if not tensor.HasField("raw_data"):
        if tensor.data_type in HALF_BYTE:
            raise ResplitError(
                ErrorCode.UNSUPPORTED_MODEL,
                f"weight {tensor.name!r} keeps 4-bit values in a typed field; save the model with raw data",
                "source",
            )
        return bytes(numpy_helper.to_array(tensor).tobytes())
    if len(tensor.raw_data) != byte_size(tensor):
        message = f"weight {tensor.name!r} has {len(tensor.raw_data)} bytes and needs {byte_size(tensor)}"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, "source")
    return bytes(tensor.raw_data)


def _make_inline(tensor: TensorProto, data: bytes) -> None:
    _clear(tensor)
    tensor.raw_data = data


def _make_external(tensor: TensorProto, ref: BlobRef) -> None:
    _clear(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", ref.digest), ("offset", "0"), ("length", str(ref.size_bytes))):
        tensor.external_data.add(key=key, value=value)


def _clear(tensor: TensorProto) -> None:
    for field in (*TYPED_FIELDS, "external_data", "data_location"):
        tensor.ClearField(field)


def _lift_constants(graph: GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type != "Constant" or value is None or byte_size(value) < INLINE_BYTES:
            kept.append(node)
            continue
        lifted = graph.initializer.add()
        lifted.CopyFrom(value)
        lifted.name = node.output[0]
    if len(kept) < len(graph.node):
        nodes = [type(node).FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)


def _refuse_weights_of_subgraphs(graph: GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                for tensor in inner.initializer:
                    if tensor.data_location == TensorProto.EXTERNAL:
                        raise ResplitError(
                            ErrorCode.UNSUPPORTED_MODEL,
                            f"weight {tensor.name!r} is external data of a subgraph; export the model with it outside",
                            "source",
                        )
                _refuse_weights_of_subgraphs(inner)

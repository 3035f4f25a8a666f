"""PURE: bodies of the Open Inference Protocol: JSON, and behind it the bytes of tensors that are not in it.

The binary form is the protocol's extension `binary_tensor_data`: a header says how long the JSON is, each tensor with a
parameter `binary_data_size` has so many bytes behind it, in order.
"""

import base64
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from resplit.replies import RequestError, Tensor, TensorResult

LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
SIZE = "binary_data_size"
BYTES = "BYTES"
Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One inference as the client of the bus takes it."""

    inputs: dict[str, Tensor]
    outputs: list[str] | None
    fields: Json
    id: str | None = None
    binary: frozenset[str] = field(default_factory=frozenset)
    """Outputs that are to come as bytes."""
    all_binary: bool = False


def read_body(body: bytes, length: str | None) -> Asked:
    """A request; raises `RequestError("invalid_request")` naming the field at fault."""
    if length is None:
        head, blob = body, b""
    else:
        if not length.isascii() or not length.isdecimal() or int(length) > len(body):
            raise _refused(f"the header {LENGTH} is {length!r}, and the body has {len(body)} bytes", LENGTH)
        head, blob = body[: int(length)], body[int(length) :]
    try:
        plain = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise _refused(f"the body is not JSON: {error}", None) from error
    if not isinstance(plain, dict) or not isinstance(plain.get("inputs"), list) or not plain["inputs"]:
        raise _refused("inputs is a list of one tensor at least", "inputs")
    inputs: dict[str, Tensor] = {}
    for number, one in enumerate(plain["inputs"]):
        name, tensor, blob = _input(one, blob, f"inputs.{number}")
        if name in inputs:
            raise _refused(f"the input {name!r} is given twice", f"inputs.{number}.name")
        inputs[name] = tensor
    if blob:
        raise _refused(f"{len(blob)} bytes are left behind the last tensor", "inputs")
    return _with_outputs(plain, inputs)


def reply_body(name: str, found: TensorResult, asked: Asked) -> tuple[Json, bytes]:
    """The JSON of a reply, and the bytes behind it."""
    outputs, blob = list[Json](), b""
    for output, tensor in found.outputs.items():
        described: Json = {"name": output, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if asked.all_binary or output in asked.binary:
            data = _packed(tensor)
            described["parameters"] = {SIZE: len(data)}
            blob += data
        else:
            described["data"] = _listed(tensor)
        outputs.append(described)
    head = {"model_name": name, "model_version": str(found.usage.epoch), "outputs": outputs}
    return {**head, "id": asked.id or found.request_id}, blob


def _input(one: Any, blob: bytes, where: str) -> tuple[str, Tensor, bytes]:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        raise _refused("an input has a name, a shape, a datatype, and data", f"{where}.name")
    shape, datatype = one.get("shape"), one.get("datatype")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise _refused("shape is a list of whole numbers", f"{where}.shape")
    if not isinstance(datatype, str):
        raise _refused("datatype is one of the protocol's words, as FP32", f"{where}.datatype")
    parameters = one.get("parameters") or {}
    size = parameters.get(SIZE) if isinstance(parameters, dict) else None
    if size is None:
        if not isinstance(one.get("data"), list):
            raise _refused("data is a list, or its size is said and its bytes follow the JSON", f"{where}.data")
        return one["name"], Tensor(tuple(shape), datatype, _flat(one["data"], where)), blob
    if not isinstance(size, int) or not 0 <= size <= len(blob):
        raise _refused(f"{SIZE} is {size!r}, and {len(blob)} bytes are left", f"{where}.parameters")
    raw, rest = blob[:size], blob[size:]
    return one["name"], Tensor(tuple(shape), datatype, _texts(raw, where) if datatype == BYTES else raw), rest


def _with_outputs(plain: Json, inputs: dict[str, Tensor]) -> Asked:
    wanted = plain.get("outputs")
    parameters = plain.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _refused("parameters is an object", "parameters")
    known = {"priority", "deadline_ms", "edge_only"}
    fields = {name: parameters[name] for name in known & parameters.keys()}
    rest = {name: value for name, value in parameters.items() if name not in known and name != "binary_data_output"}
    if rest:
        fields["parameters"] = rest
    all_binary = bool(parameters.get("binary_data_output"))
    if wanted is None:
        return Asked(inputs, None, fields, plain.get("id"), all_binary=all_binary)
    if not isinstance(wanted, list) or not all(isinstance(w, dict) and isinstance(w.get("name"), str) for w in wanted):
        raise _refused("outputs is a list of objects with a name", "outputs")
    binary = [w["name"] for w in wanted if (w.get("parameters") or {}).get("binary_data")]
    return Asked(inputs, [w["name"] for w in wanted], fields, plain.get("id"), frozenset(binary), all_binary)


def _flat(data: list[Any], where: str) -> list[Any]:
    """Nested lists are row-major."""
    while data and isinstance(data[0], list):
        if not all(isinstance(row, list) for row in data):
            raise _refused("data is nested unevenly", f"{where}.data")
        data = [value for row in data for value in row]
    return data


def _texts(raw: bytes, where: str) -> list[Any]:
    """Strings: each behind its length, four bytes, little-endian."""
    found, at = list[Any](), 0
    while at < len(raw):
        if len(raw) < at + 4 or len(raw) < at + 4 + (size := int(struct.unpack_from("<I", raw, at)[0])):
            raise _refused("a string is longer than the bytes that are there", where)
        try:
            found.append(raw[at + 4 : at + 4 + size].decode())
        except UnicodeDecodeError as error:
            raise _refused("a string is not UTF-8", where) from error
        at += 4 + size
    return found


def _packed(tensor: Tensor) -> bytes:
    """A tensor as bytes, little-endian and row-major."""
    if isinstance(tensor.data, bytes):
        return tensor.data
    if tensor.datatype == BYTES:
        texts = [one if isinstance(one, bytes) else str(one).encode() for one in tensor.data]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    import numpy as np  # noqa: PLC0415

    from schemas.tensor import OIP_TO_NUMPY  # noqa: PLC0415

    return np.array(tensor.data, dtype=np.dtype(OIP_TO_NUMPY[tensor.datatype]).newbyteorder("<")).tobytes()


def _listed(tensor: Tensor) -> list[Any]:
    if not isinstance(tensor.data, bytes):
        return [base64.b64encode(one).decode() if isinstance(one, bytes) else one for one in tensor.data]
    from schemas.tensor import OIP_TO_NUMPY, view  # noqa: PLC0415

    array = view(tensor.data, OIP_TO_NUMPY.get(tensor.datatype, ""), tensor.shape, "outputs")
    return array.reshape(-1).tolist()


def _refused(message: str, where: str | None) -> RequestError:
    return RequestError("invalid_request", message, where)

"""Tensor requests: the Open Inference Protocol's tensors to numpy and back, checked against the manifest."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from models.text import Text
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, TensorSpec
from schemas.request import OipTensor, TensorRequest
from schemas.tensor import NUMPY_TO_OIP, OIP_TO_NUMPY, Array, view


def read_inputs(request: TensorRequest, manifest: Manifest) -> dict[str, Array]:
    """The request's tensors by name; raises `ResplitError` naming the input and what is wrong with it."""
    wanted = {spec.name: spec for spec in manifest.inputs}
    found: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for i, tensor in enumerate(request.inputs):
        where = f"inputs.{i}"
        spec = wanted.get(tensor.name)
        if spec is None:
            raise _invalid(f"{manifest.name} has no input {tensor.name!r}; it has {sorted(wanted)}", f"{where}.name")
        if tensor.name in found:
            raise _invalid(f"input {tensor.name!r} is given twice", f"{where}.name")
        dtype = OIP_TO_NUMPY.get(tensor.datatype)
        if dtype != spec.dtype:
            expected = NUMPY_TO_OIP.get(spec.dtype, spec.dtype)
            raise _invalid(f"{tensor.name!r} is {expected}, not {tensor.datatype!r}", f"{where}.datatype")
        _check_shape(spec, tensor.shape, sizes, f"{where}.shape")
        found[tensor.name] = read_tensor(tensor, dtype, where)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise _invalid(f"{manifest.name} also needs {missing}", "inputs")
    return found


def requested_outputs(request: TensorRequest, manifest: Manifest) -> tuple[str, ...]:
    """Names of the outputs to return: those asked for, or all."""
    names = tuple(spec.name for spec in manifest.outputs)
    if request.outputs is None:
        return names
    for i, output in enumerate(request.outputs):
        if output.name not in names:
            raise _invalid(f"{manifest.name} has no output {output.name!r}; it has {list(names)}", f"outputs.{i}.name")
    return tuple(output.name for output in request.outputs)


def write_outputs(tensors: Mapping[str, Array], names: Sequence[str], *, binary: bool) -> tuple[OipTensor, ...]:
    """The outputs as the client asked: raw bytes where its inputs were, else flat lists."""
    return tuple(
        OipTensor(
            name=name,
            shape=tensors[name].shape,
            datatype=NUMPY_TO_OIP[tensors[name].dtype.name],
            raw=np.ascontiguousarray(tensors[name]).tobytes() if binary else None,
            data=None if binary else tensors[name].reshape(-1).tolist(),
        )
        for name in names
    )


def read_answer(outputs: Sequence[OipTensor], names: Sequence[str], manifest: Manifest) -> dict[str, Array]:
    """The tensors `names` of an answer that was computed elsewhere; raises `ResplitError` where one is missing, or is
    none of this model."""
    given = {tensor.name: (i, tensor) for i, tensor in enumerate(outputs)}
    found: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for spec in manifest.outputs:
        if spec.name not in names:
            continue
        if spec.name not in given:
            raise _invalid(f"output {spec.name!r} is missing", "outputs")
        i, tensor = given[spec.name]
        if OIP_TO_NUMPY.get(tensor.datatype) != spec.dtype:
            raise _invalid(f"{spec.name!r} is {NUMPY_TO_OIP.get(spec.dtype, spec.dtype)}", f"outputs.{i}.datatype")
        _check_shape(spec, tensor.shape, sizes, f"outputs.{i}.shape")
        found[spec.name] = read_tensor(tensor, spec.dtype, f"outputs.{i}")
    return found


def text_inputs(text: Text, manifest: Manifest, sentence: str, field: str) -> dict[str, Array]:
    """An embedder's inputs for one text, without padding: ids, a mask of ones, zero token types."""
    assert manifest.text is not None
    ids = text.encode(sentence)
    if not 0 < len(ids) <= manifest.text.context_length:
        message = f"the text has {len(ids)} tokens; 1 to {manifest.text.context_length} fit"
        raise ResplitError(ErrorCode.CONTEXT_EXCEEDED, message, field)
    row = np.asarray([ids], np.int64)
    known = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    positions = {"position_ids": np.arange(row.shape[1])[None, :]}
    feeds = {**known, **positions}
    return {spec.name: feeds[spec.name].astype(spec.dtype) for spec in manifest.inputs}


def pool(output: Array, manifest: Manifest) -> Array:
    """One vector from an embedder's output for one text, [1, S, D] or [1, D], in float32."""
    assert manifest.text is not None
    vector = output[0].astype(np.float32)
    if vector.ndim == 2:
        vector = vector[0] if manifest.text.pooling == "cls" else vector.mean(axis=0)
    if manifest.text.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    result: Array = vector
    return result


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int], field: str) -> None:
    """Fixed dimensions match; a symbolic one has the same size wherever its name stands."""
    if len(shape) != len(spec.shape):
        raise _invalid(f"{spec.name!r} has {len(spec.shape)} dimensions {list(spec.shape)}, not {list(shape)}", field)
    for size, expected in zip(shape, spec.shape, strict=True):
        bound = expected if isinstance(expected, int) else sizes.setdefault(expected, size)
        if size != bound or size < 1:
            raise _invalid(f"{spec.name!r} is {list(spec.shape)}, not {list(shape)}", field)


def read_tensor(tensor: OipTensor, dtype: str, where: str) -> Array:
    """The values of a tensor, of its shape; raises INVALID_REQUEST below the field `where`."""
    if tensor.raw is not None:
        return view(tensor.raw, dtype, tensor.shape, f"{where}.raw")
    assert tensor.data is not None
    flat = list(_flat(tensor.data))
    if len(flat) != prod(tensor.shape):
        raise _invalid(
            f"shape {list(tensor.shape)} needs {prod(tensor.shape)} values, {len(flat)} came", f"{where}.data"
        )
    kind = np.dtype(dtype)
    numbers = (bool,) if kind.kind == "b" else (int,) if kind.kind in "iu" else (int, float)
    if not all(isinstance(value, numbers) and (kind.kind == "b" or not isinstance(value, bool)) for value in flat):
        raise _invalid(f"{tensor.name!r} holds a value that is not {tensor.datatype}", f"{where}.data")
    try:
        return np.asarray(flat, dtype).reshape(tensor.shape)
    except (OverflowError, ValueError) as error:
        raise _invalid(
            f"{tensor.name!r} holds a value out of the range of {tensor.datatype}", f"{where}.data"
        ) from error


def _flat(data: list[Any]) -> Any:
    for value in data:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def _invalid(message: str, field: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, message, field)

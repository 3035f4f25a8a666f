"""Memory on the device that computes: one way to allocate, address, fill and read it, on CPU and CUDA."""

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from schemas.tensor import Array

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """A contiguous tensor at a fixed address, bound to sessions by that address.

    `owner` keeps the memory alive: a numpy array on the CPU, an OrtValue on CUDA.
    """

    device: Device
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pointer: int
    owner: Any

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def fill(self, array: Array) -> None:
        """Copy `array` into the buffer; it has as many elements, of the same kind, and is cast and shaped to fit."""
        if self.device == "cpu":
            self.owner[...] = array if array.shape == self.shape else array.reshape(self.shape)
        else:
            self.owner.update_inplace(np.ascontiguousarray(array.reshape(self.shape), self.dtype))

    def read(self) -> Array:
        """A copy of the contents, on the host."""
        copy: Array = self.owner.copy() if self.device == "cpu" else self.owner.numpy()
        return copy


def allocate(device: Device, shape: tuple[int, ...], dtype: str) -> Buffer:
    """Zeroed memory on the CPU (committed by the kernel only where it is touched), uninitialised on CUDA."""
    kind = np.dtype(dtype)
    if device == "cpu":
        array = _pages(shape, kind)
        return Buffer(device, shape, kind, array.ctypes.data, array)
    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind.type, device, 0)
    return Buffer(device, shape, kind, value.data_ptr(), value)


def _pages(shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """Pages of its own. numpy asks for huge ones, of which the first token of a sequence would commit 2 MiB each."""
    size = max(1, int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, kind, int(np.prod(shape, dtype=np.int64))).reshape(shape)


def release_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps what a closed session held."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def bind_input(binding: Any, name: str, buffer: Buffer) -> None:
    """Make all of `buffer` the input `name`."""
    binding.bind_input(name, buffer.device, 0, buffer.dtype.type, buffer.shape, buffer.pointer)


def bind_output(binding: Any, name: str, buffer: Buffer) -> None:
    """Make all of `buffer` the output `name`."""
    binding.bind_output(name, buffer.device, 0, buffer.dtype.type, buffer.shape, buffer.pointer)


def rows_of(buffer: Buffer, rows: range) -> Buffer:
    """Rows `rows` of `buffer`, in place."""
    shape = (len(rows), *buffer.shape[1:])
    pointer = buffer.pointer + rows.start * buffer.row_bytes
    owner = buffer.owner[rows.start : rows.stop] if buffer.device == "cpu" else buffer.owner
    return Buffer(buffer.device, shape, buffer.dtype, pointer, owner)

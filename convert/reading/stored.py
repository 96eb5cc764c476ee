"""Tensors as they lie in files, read some rows at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from olmo3_mlx.checkpoints.headers import FORMATS, TensorHeader, read_headers
from olmo3_mlx.errors import CheckpointError
from olmo3_mlx.quantization import Quantization

_NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U32": "<u4", "U8": "u1"}  # of the same size

_PIECE_BYTES = 2**24  # of a tensor as it is stored


class Tensor(Protocol):
    """A tensor that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it will be read."""
        ...

    @property
    def dtype(self) -> mx.Dtype:
        """As it will be read."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in its file."""
        ...

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop` of the first axis, evaluated. Raises CheckpointError."""
        ...


class Formatted:
    """What is known of a tensor by its shape and safetensors' name for its dtype."""

    shape: tuple[int, ...]
    format: str

    @property
    def dtype(self) -> mx.Dtype:
        """MLX's name for how it is stored."""
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Stored(TensorHeader):
    """A tensor in a safetensors file, unread yet."""

    @classmethod
    def at(cls, header: TensorHeader) -> "Stored":
        """The tensor that a header tells of."""
        return cls(header.file, header.offset, header.shape, header.format)

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop` of the first axis. Raises CheckpointError if the file is too short."""
        data = rows_in(self.file, self.offset, self.shape, self.format, start=start, stop=stop)
        return evaluated(data, self.format)


@dataclass(frozen=True)
class Dequantized:
    """What a quantized tensor stands for, in float32: `parts` are its codes, scales and, if its mode has
    any, biases.
    """

    parts: tuple[Tensor, ...]
    how: Quantization
    dtype: mx.Dtype = mx.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights, not of their codes."""
        rows, words = self.parts[0].shape
        return rows, words * 32 // self.how.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts)

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop`, dequantized."""
        array = dequantized([part.rows(start, stop) for part in self.parts], self.how)
        mx.eval(array)
        return array


def numpy_dtype(format: str) -> "np.dtype[Any]":
    """NumPy's type of the same size for a type's name in safetensors."""
    return np.dtype(_NUMPY[format])


def rows_in(
    file: Path, offset: int, shape: tuple[int, ...], format: str, *, start: int, stop: int
) -> "np.ndarray[Any, Any]":
    """Rows `start` to `stop` of what lies in a file from `offset` on, in NumPy's type of that size.

    Raises CheckpointError if the file cannot be read or is too short.
    """
    stored, width = numpy_dtype(format), prod(shape[1:])
    count = (stop - start) * width
    try:
        data = np.fromfile(file, stored, count, offset=offset + start * width * stored.itemsize)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}), fetch it again") from None
    if data.size != count:
        raise CheckpointError(f"{file}: cut short, fetch it again")
    return data.reshape(stop - start, *shape[1:])


def evaluated(data: "np.ndarray[Any, Any]", format: str) -> mx.array:
    """What was read in NumPy's type of that size, in MLX's."""
    array, dtype = mx.array(data), FORMATS[format]
    array = array.view(dtype) if array.dtype != dtype else array
    mx.eval(array)
    return array


def dequantized(parts: Sequence[mx.array], how: Quantization) -> mx.array:
    """What codes, scales and, if the mode has any, biases stand for, in float32, lazily."""
    codes, scales, *biases = parts
    if how.mode == "affine":  # in the scales' own precision the products would be rounded
        scales, biases = scales.astype(mx.float32), [b.astype(mx.float32) for b in biases]
    return mx.dequantize(
        codes,
        scales,
        biases[0] if biases else None,
        group_size=how.group_size,
        bits=how.bits,
        mode=how.mode,
        dtype=mx.float32,
    )


def read(tensor: Tensor) -> mx.array:
    """All of it."""
    return tensor.rows(0, tensor.shape[0])


def rows_at_once(tensor: Tensor) -> int:
    """How many rows of a tensor are read in one piece."""
    row = tensor.dtype.size
    for axis in tensor.shape[1:]:
        row *= axis
    return max(1, _PIECE_BYTES // row)


def pieces(tensor: Tensor) -> Iterator[mx.array]:
    """A tensor's rows, some at a time, evaluated."""
    each, rows = rows_at_once(tensor), tensor.shape[0]
    for start in range(0, rows, each):
        yield tensor.rows(start, min(start + each, rows))


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises CheckpointError, see `read_headers`."""
    return {name: Stored.at(header) for name, header in read_headers(file).items()}

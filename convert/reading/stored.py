"""Tensors as they lie in files, read some rows at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from convert.quantized import dequantized
from olmo3_mlx.checkpoints.headers import FORMATS, TensorHeader, read_headers
from olmo3_mlx.errors import CheckpointError
from olmo3_mlx.quantization import Quantization

_NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U32": "<u4", "U8": "u1"}  # of the same size

_PIECE_BYTES = 2**24  # of a tensor as it is stored


class Tensor(Protocol):
    """A tensor that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that reading all rows gives."""
        ...

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the rows that reading gives."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in its file."""
        ...

    def rows(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop` of the first axis; they are evaluated. Raises CheckpointError."""
        ...


@dataclass(frozen=True)
class Stored(TensorHeader):
    """A tensor in a safetensors file, unread yet."""

    @classmethod
    def at(cls, header: TensorHeader) -> "Stored":
        """The tensor that a header tells of."""
        return cls(header.file, header.offset, header.shape, header.format)

    def rows(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop` of the first axis. Raises CheckpointError if the file is too short."""
        data = rows_in(self.file, self.offset, self.shape, self.format, start=start, stop=stop)
        return evaluated(data, self.format)


@dataclass(frozen=True)
class Dequantized:
    """The weights that a quantized tensor stands for, in float32. `parts` are its codes, its scales and, if
    the mode of its `scheme` has any, its biases.
    """

    parts: tuple[Tensor, ...]
    scheme: Quantization
    dtype: mx.Dtype = mx.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights, not of their codes."""
        rows, packed = self.parts[0].shape
        return rows, packed * 32 // self.scheme.bits

    @property
    def nbytes(self) -> int:
        """The bytes that all parts take."""
        return sum(part.nbytes for part in self.parts)

    def rows(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop`, and dequantize them."""
        array = dequantized([part.rows(start, stop) for part in self.parts], self.scheme)
        mx.eval(array)
        return array


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Within it a file of a checkpoint is read, at `path` or below: the disk's errors become CheckpointError,
    which blames the checkpoint, as whoever writes elsewhere would take them for faults of the destination.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        reason = error.strerror or error
        raise CheckpointError(f"{named}: cannot be read ({reason}): check its permissions") from None


def numpy_dtype(format: str) -> "np.dtype[Any]":
    """NumPy's type of the same size for a type's name in safetensors."""
    return np.dtype(_NUMPY[format])


def rows_in(
    file: Path, offset: int, shape: tuple[int, ...], format: str, *, start: int, stop: int
) -> "np.ndarray[Any, Any]":
    """Read rows `start` to `stop` of the tensor that lies in a file from `offset` on, in NumPy's type of that
    size.

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
    """Turn what was read in NumPy's type of that size into an MLX array of the format's dtype."""
    array, dtype = mx.array(data), FORMATS[format]
    array = array.view(dtype) if array.dtype != dtype else array
    mx.eval(array)
    return array


def read(tensor: Tensor) -> mx.array:
    """Read all rows of a tensor."""
    return tensor.rows(0, tensor.shape[0])


def rows_at_once(tensor: Tensor) -> int:
    """The number of a tensor's rows that are read in one piece."""
    row = tensor.dtype.size
    for axis in tensor.shape[1:]:
        row *= axis
    return max(1, _PIECE_BYTES // row)


def pieces(tensor: Tensor) -> Iterator[mx.array]:
    """Read a tensor's rows in order, some at a time; they are evaluated."""
    each, rows = rows_at_once(tensor), tensor.shape[0]
    for start in range(0, rows, each):
        yield tensor.rows(start, min(start + each, rows))


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises CheckpointError, see `read_headers`."""
    return {name: Stored.at(header) for name, header in read_headers(file).items()}

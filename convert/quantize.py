"""Quantizing by rounding to nearest, some rows at a time, so that no tensor is ever whole in memory."""

from collections.abc import Iterator

import mlx.core as mx

from convert.stored import Tensor
from olmo3_mlx.quantization import Quantization

_PIECE_BYTES = 2**24  # of a tensor as it is stored


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


def rounded(name: str, weight: mx.array, how: Quantization | None) -> dict[str, mx.array]:
    """What rows of a weight become, by name: themselves, or codes, scales and perhaps biases, lazily."""
    if how is None:
        return {name: weight}
    path = name.removesuffix(".weight")
    parts = mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode)
    return dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))

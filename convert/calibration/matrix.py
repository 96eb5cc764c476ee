"""A layer's weights, or some rows of them, while they are quantized."""

from dataclasses import dataclass, replace

import mlx.core as mx

from convert.quantized import part_names
from olmo3_mlx.packing import packed
from olmo3_mlx.quantization import Quantization


@dataclass(frozen=True)
class QuantizedMatrix:
    """A layer's quantized weights: codes [rows, n], uint8; scales and biases [rows, n / group_size], float32,
    rounded to `dtype`, in which they are stored.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    scheme: Quantization
    dtype: mx.Dtype

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.scheme.bits - 1)

    def dense(self) -> mx.array:
        """The weights that codes, scales and biases stand for, [rows, n]."""
        group = self.scheme.group_size
        return self.codes * wide(self.scales, group) + wide(self.biases, group)

    def rounding(self, weight: mx.array) -> "QuantizedMatrix":
        """The same scales and biases with the codes nearest to a weight [rows, n]."""
        scales, biases = (wide(each, self.scheme.group_size) for each in (self.scales, self.biases))
        return replace(self, codes=nearest(weight, scales, biases, self.top).astype(mx.uint8))

    def grid_at(self, columns: mx.array) -> tuple[mx.array, mx.array]:
        """Scales and biases of some of the columns [c]: [c, rows] each."""
        groups = columns // self.scheme.group_size
        return self.scales[:, groups].T, self.biases[:, groups].T

    def tensors(self, path: str) -> dict[str, mx.array]:
        """The three tensors as mx.quantize gives them, by their names in a checkpoint."""
        codes = packed(self.codes, self.scheme.bits)
        parts = (codes, self.scales.astype(self.dtype), self.biases.astype(self.dtype))
        return dict(zip(part_names(f"{path}.weight"), parts, strict=True))


def nearest(weight: mx.array, scale: mx.array, bias: mx.array, top: mx.array | int) -> mx.array:
    """The codes, whole numbers from 0 to `top`, that come nearest to a weight."""
    return mx.clip(mx.round((weight - bias) / scale), 0, top)


def wide(values: mx.array, group: int) -> mx.array:
    """One value a group -> one a weight."""
    return mx.repeat(values, group, axis=-1)

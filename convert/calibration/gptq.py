"""Choosing a layer's codes, scales and biases so that its outputs on the inputs that it gets change little.

The error of a layer with weights w [rows, n] on inputs x is (w - v) H (w - v)^T summed over its rows,
where v = scale * code + bias are the quantized weights and H [n, n] = sum of x x^T over the inputs, a Metric.
It is made small in turns: scales and biases by search, codes by GPTQ (Frantar et al. 2022,
arXiv:2210.17323) with fixed groups, scales and biases again by least squares under H, codes again by
coordinate descent, which is GPTQ's step repeated with every other code in place (Behdin et al. 2023,
arXiv:2309.01885, "QuantEase").

All arrays are float32. Columns are worked on as rows of the transposed matrices, which are contiguous.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from convert.calibration.solving import Metric, solved
from convert.quantized import part_names
from olmo3_mlx.packing import packed
from olmo3_mlx.quantization import Quantization

_COLUMNS = 64  # whose error is carried on at once
_SHRINKS = np.linspace(1.0, 0.6, 17)  # of a group's range, tried one after another
_SOLVED_BYTES = 2**28  # of normal equations solved at once


@dataclass(frozen=True)
class QuantizedMatrix:
    """A layer's quantized weights: codes [rows, n], whole numbers; scales and biases [rows, n / group_size],
    rounded to `dtype`, in which they are stored.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    scheme: Quantization
    dtype: mx.Dtype

    def dense(self) -> mx.array:
        """The weights that codes, scales and biases stand for, [rows, n]."""
        group = self.scheme.group_size
        return self.codes * _wide(self.scales, group) + _wide(self.biases, group)

    def tensors(self, path: str) -> dict[str, mx.array]:
        """The three tensors as mx.quantize gives them, by their names in a checkpoint."""
        codes = packed(self.codes, self.scheme.bits)
        parts = (codes, self.scales.astype(self.dtype), self.biases.astype(self.dtype))
        return dict(zip(part_names(f"{path}.weight"), parts, strict=True))


def quantized(
    weight: mx.array, metric: Metric, scheme: Quantization, dtype: mx.Dtype, *, passes: int = 3
) -> QuantizedMatrix:
    """Quantize weight [rows, n] under a metric of n, with `passes` refits of scales and codes."""
    matrix = searched(weight, mx.diag(metric.hessian), scheme, dtype)
    matrix = replace(matrix, codes=_gptq(weight, metric, matrix))
    for _ in range(passes):
        matrix = _refitted(weight, metric.hessian, matrix)
        matrix = replace(matrix, codes=_descended(weight, metric.hessian, matrix))
    return matrix


def searched(
    weight: mx.array, importance: mx.array, scheme: Quantization, dtype: mx.Dtype
) -> QuantizedMatrix:
    """Quantize weight [rows, n]: each group's scale and bias are the best of some shrunk ranges, by squared
    errors weighted with importance [n].
    """
    group, top = scheme.group_size, 2**scheme.bits - 1
    groups = weight.reshape(len(weight), -1, group)
    weights = importance.reshape(1, -1, group)
    low, high = groups.min(-1), groups.max(-1)
    best = mx.full(low.shape, mx.inf)
    scales, biases = mx.ones_like(low), mx.zeros_like(low)
    for shrink in map(float, _SHRINKS):
        scale = _rounded((high - low) * shrink / top, dtype)
        scale = mx.where(scale > 0, scale, 1.0)
        bias = _rounded((low + high) / 2 - (high - low) * shrink / 2, dtype)
        codes = _nearest(groups, scale[..., None], bias[..., None], top)
        error = codes * scale[..., None] + bias[..., None] - groups
        loss = (error * error * weights).sum(-1)
        better = loss < best
        best = mx.where(better, loss, best)
        scales, biases = mx.where(better, scale, scales), mx.where(better, bias, biases)
        mx.eval(best, scales, biases)  # one try's temporaries at a time
    codes = _nearest(weight, _wide(scales, group), _wide(biases, group), top)
    mx.eval(codes)
    return QuantizedMatrix(codes, scales, biases, scheme, dtype)


def _gptq(weight: mx.array, metric: Metric, matrix: QuantizedMatrix) -> mx.array:
    """The codes [rows, n] of GPTQ: column by column it rounds, and takes the error out of those to come."""
    order, factor = metric.order, metric.factor
    group, top = matrix.scheme.group_size, 2**matrix.scheme.bits - 1
    scales, biases = (_wide(each, group).T[order] for each in (matrix.scales, matrix.biases))
    left, diagonal = weight.T[order], mx.diag(factor)
    errors, codes = mx.zeros_like(left), []
    for start, stop in _spans(len(left)):
        span = slice(start, stop)
        now = left[span] - factor[:start, span].T @ errors[:start]
        taken = []
        for j in range(start, stop):
            column = now[j - start]
            codes.append(_nearest(column, scales[j], biases[j], top))
            error = (column - codes[-1] * scales[j] - biases[j]) / diagonal[j]
            now = now - factor[j, span, None] * error
            taken.append(error)
        errors[span] = mx.stack(taken)
        mx.eval(errors, codes[start:])
    return mx.stack(codes)[mx.argsort(order)].T


def _descended(weight: mx.array, hessian: mx.array, matrix: QuantizedMatrix) -> mx.array:
    """The codes [rows, n] after each column was rounded anew, once, with all others as they are."""
    group, top = matrix.scheme.group_size, 2**matrix.scheme.bits - 1
    scales, before = _wide(matrix.scales, group).T, matrix.codes.T
    slopes = hessian @ (weight - matrix.dense()).T  # [n, rows]
    diagonal, moved, codes = mx.diag(hessian), mx.zeros_like(slopes), []
    for start, stop in _spans(len(slopes)):
        span = slice(start, stop)
        slope = slopes[span] - hessian[span, :start] @ moved[:start]
        moves = []
        for j in range(start, stop):
            wanted = before[j] + slope[j - start] / (diagonal[j] * scales[j])
            codes.append(mx.clip(mx.round(wanted), 0, top))
            moves.append((codes[-1] - before[j]) * scales[j])
            slope = slope - hessian[span, j, None] * moves[-1]
        moved[span] = mx.stack(moves)
        mx.eval(moved, codes[start:])
    return mx.stack(codes).T


def _spans(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + _COLUMNS, columns)) for start in range(0, columns, _COLUMNS)]


def _refitted(weight: mx.array, hessian: mx.array, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The matrix with scales and biases by least squares under the Hessian, its codes as they are.

    Codes are counted from their middle, so that a group's scale and bias hardly go together.
    """
    count, middle = matrix.scales.shape[1], (2**matrix.scheme.bits - 1) / 2
    each = max(1, _SOLVED_BYTES // (8 * count**2))
    slopes = (weight - matrix.dense()) @ hessian
    changes = []
    for start in range(0, len(weight), each):
        rows = slice(start, start + each)
        changes.append(_least_squares(matrix.codes[rows] - middle, slopes[rows], hessian, count))
        mx.eval(changes[-1])
    change = mx.concatenate(changes)
    scales = _rounded(matrix.scales + change[:, 0], matrix.dtype)
    biases = _rounded(matrix.biases + change[:, 1] - middle * change[:, 0], matrix.dtype)
    good = mx.isfinite(scales) & mx.isfinite(biases) & (scales != 0)
    return replace(
        matrix, scales=mx.where(good, scales, matrix.scales), biases=mx.where(good, biases, matrix.biases)
    )


def _least_squares(codes: mx.array, slopes: mx.array, hessian: mx.array, count: int) -> mx.array:
    """The changes of scales and biases, [rows, 2, count], where slopes = error @ hessian, [rows, n]."""
    rows, n = codes.shape
    group = n // count
    parts = codes.reshape(rows, count, group)
    first, mixed = [], []  # of the normal equations: scales with scales, scales with biases
    for g in range(count):
        span = slice(g * group, (g + 1) * group)
        seen = (codes[:, span] @ hessian[span]).reshape(rows, count, group)
        first.append((seen * parts).sum(-1))
        mixed.append(seen.sum(-1))
        mx.eval(first[-1], mixed[-1])
    scales, both = mx.stack(first, axis=1), mx.stack(mixed, axis=1)  # [rows, count, count]
    biases = hessian.reshape(count, group, n).sum(1).reshape(count, count, group).sum(-1)
    diagonal = mx.stack(
        [mx.diagonal(scales, 0, 1, 2), mx.broadcast_to(mx.diag(biases), (rows, count))], axis=1
    )

    def times(x: mx.array) -> mx.array:
        by_scale, by_bias = x[:, 0], x[:, 1]
        top = (scales @ by_scale[..., None] + both @ by_bias[..., None])[..., 0]
        return mx.stack([top, (by_scale[:, None] @ both)[:, 0] + by_bias @ biases], axis=1)

    slopes = slopes.reshape(rows, count, group)
    return solved(times, mx.stack([(slopes * parts).sum(-1), slopes.sum(-1)], axis=1), diagonal)


def _nearest(weight: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    return mx.clip(mx.round((weight - bias) / scale), 0, top)


def _wide(values: mx.array, group: int) -> mx.array:
    return mx.repeat(values, group, axis=-1)


def _rounded(values: mx.array, dtype: mx.Dtype) -> mx.array:
    return values.astype(dtype).astype(mx.float32)

"""Choosing scales and biases: by search before there are codes, by least squares when there are."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from convert.calibration.matrix import QuantizedMatrix, nearest
from olmo3_mlx.quantization import Quantization

_SHRINKS = np.linspace(1.0, 0.6, 17)  # of a group's range, tried one after another
_SOLVED_BYTES = 2**28  # of normal equations solved at once
_GROUPS = 16  # summed up before the device is waited for
_STEPS = 8  # of conjugate gradients; more change nothing on trained layers (tried up to 64)


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
        codes = nearest(groups, scale[..., None], bias[..., None], top)
        error = codes * scale[..., None] + bias[..., None] - groups
        loss = (error * error * weights).sum(-1)
        better = loss < best
        best = mx.where(better, loss, best)
        scales, biases = mx.where(better, scale, scales), mx.where(better, bias, biases)
        mx.eval(best, scales, biases)  # one try's temporaries at a time
    return QuantizedMatrix(mx.zeros((0,)), scales, biases, scheme, dtype).rounding(weight)


def refitted(weight: mx.array, hessian: mx.array, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The matrix with scales and biases by least squares under the Hessian, its codes as they are.

    Codes are counted from their middle, so that a group's scale and bias hardly go together.
    """
    count, middle = matrix.scales.shape[1], matrix.top / 2
    each = max(1, _SOLVED_BYTES // (8 * count**2))
    changes = []
    for start in range(0, len(weight), each):
        rows = slice(start, start + each)
        some = replace(
            matrix, codes=matrix.codes[rows], scales=matrix.scales[rows], biases=matrix.biases[rows]
        )
        slopes = (weight[rows] - some.dense()) @ hessian
        changes.append(_least_squares(some.codes - middle, slopes, hessian, count))
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
        if g % _GROUPS == 0:
            mx.eval(first[-_GROUPS:], mixed[-_GROUPS:])
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


def solved(times: Callable[[mx.array], mx.array], right: mx.array, diagonal: mx.array) -> mx.array:
    """Solve times(x) = right [rows, a, b] for x, nearly, by conjugate gradients for each row, preconditioned
    with the system's `diagonal` [rows, a, b].
    """

    def dot(a: mx.array, b: mx.array) -> mx.array:
        return (a * b).sum((1, 2), keepdims=True)

    diagonal = mx.maximum(diagonal, 1e-6 * diagonal.mean((1, 2), keepdims=True) + 1e-30)
    x, left, way = mx.zeros_like(right), right, right / diagonal
    size = first = dot(left, way)
    for _ in range(_STEPS):
        result = times(way)
        step = mx.where(size > 1e-9 * first, size / dot(way, result), 0)
        x, left = x + step * way, left - step * result
        better = dot(left, left / diagonal)
        way = left / diagonal + mx.where(size > 0, better / size, 0) * way
        size = better
        mx.eval(x, left, way, size)
    return x


def _rounded(values: mx.array, dtype: mx.Dtype) -> mx.array:
    return values.astype(dtype).astype(mx.float32)

"""Codes, scales and biases of one layer, chosen for what it does to the inputs that it gets.

The error of a layer with weights w [rows, n] on inputs x is (w - v) H (w - v)^T summed over its rows,
where v = scale * code + bias are the quantized weights and H [n, n] = sum of x x^T over the inputs.
It is made small in turns: scales and biases by search, codes by GPTQ (Frantar et al. 2022,
arXiv:2210.17323) with fixed groups, scales and biases again by least squares under H, codes again by
coordinate descent, which is GPTQ's step repeated with every other code in place (Behdin et al. 2023,
arXiv:2309.01885, "QuantEase").
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from olmo3_mlx.quantization import Quantization

Floats = NDArray[np.float32]

_COLUMNS = 64  # of a block whose error is carried on at once
_SHRINKS = np.linspace(1.0, 0.6, 17)  # of a group's range, tried one after another
_DAMPING = 0.01  # of H's mean diagonal, added to it
_SOLVED_BYTES = 2**28  # of normal equations solved at once


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: codes [rows, n] as float32 integers; scales and biases [rows, n / group_size],
    rounded to `dtype`, in which they are stored.
    """

    codes: Floats
    scales: Floats
    biases: Floats
    how: Quantization
    dtype: mx.Dtype

    def dense(self) -> Floats:
        """The weights that they stand for, [rows, n]."""
        group = self.how.group_size
        return self.codes * _wide(self.scales, group) + _wide(self.biases, group)

    def tensors(self, path: str) -> dict[str, mx.array]:
        """As mx.quantize gives them, by their names in a checkpoint."""
        return {
            f"{path}.weight": mx.array(packed(self.codes, self.how.bits)),
            f"{path}.scales": mx.array(self.scales).astype(self.dtype),
            f"{path}.biases": mx.array(self.biases).astype(self.dtype),
        }


def packed(codes: Floats, bits: int) -> NDArray[np.uint32]:
    """codes [rows, n] -> [rows, n * bits / 32]: one stream of bits, the lowest first."""
    bytes_ = codes.astype(np.uint8)[..., None]
    stream = np.unpackbits(bytes_, axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    return np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little")).view("<u4")


def quantized(
    weight: Floats, hessian: Floats, how: Quantization, dtype: mx.Dtype, *, passes: int = 3
) -> Codes:
    """The codes of weight [rows, n] under hessian [n, n], after `passes` refits of scales and codes."""
    hessian = damped(hessian)
    made = searched(weight, np.diag(hessian), how, dtype)
    made = _with_codes(made, _gptq(weight, hessian, made))
    for _ in range(passes):
        made = _refitted(weight, hessian, made)
        made = _with_codes(made, _descended(weight, hessian, made))
    return made


def damped(hessian: Floats) -> Floats:
    """`hessian` with a little of its mean diagonal added, and so more where an input was always 0."""
    mean = float(np.mean(np.diag(hessian))) or 1.0
    made = hessian / np.float32(mean)
    np.fill_diagonal(made, made.diagonal() + np.float32(_DAMPING))
    return made


def searched(weight: Floats, importance: Floats, how: Quantization, dtype: mx.Dtype) -> Codes:
    """Each group's scale and bias from the best of some shrunk ranges, by squared errors weighted with
    importance [n].
    """
    group, top = how.group_size, 2**how.bits - 1
    groups = weight.reshape(len(weight), -1, group)
    weights = importance.reshape(1, -1, group)
    low, high = groups.min(-1), groups.max(-1)
    middle = (low + high) / 2
    best = np.full(low.shape, np.inf, np.float32)
    scales, biases = np.ones_like(low), np.zeros_like(low)
    for shrink in _SHRINKS:
        scale = _rounded((high - low) * shrink / top, dtype)
        scale = np.where(scale > 0, scale, np.float32(1))
        bias = _rounded(middle - (high - low) * shrink / 2, dtype)
        codes = _nearest(groups, scale[..., None], bias[..., None], top)
        error = codes * scale[..., None] + bias[..., None] - groups
        loss = (error * error * weights).sum(-1)
        better = loss < best
        best = np.where(better, loss, best)
        scales, biases = np.where(better, scale, scales), np.where(better, bias, biases)
    made = Codes(np.empty_like(weight), scales, biases, how, dtype)
    codes = _nearest(weight, _wide(scales, group), _wide(biases, group), top)
    return _with_codes(made, codes)


def _gptq(weight: Floats, hessian: Floats, made: Codes) -> Floats:
    """Column by column: round, and take the error out of the columns that are still to come."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    back = np.argsort(order, kind="stable")
    group, top = made.how.group_size, 2**made.how.bits - 1
    scales, biases = _wide(made.scales, group)[:, order].T, _wide(made.biases, group)[:, order].T
    inverse = np.linalg.inv(hessian[np.ix_(order, order)].astype(np.float64))
    factor = np.linalg.cholesky(inverse).T.astype(np.float32)  # upper
    left = np.ascontiguousarray(weight[:, order].T)  # [n, rows], a column is contiguous
    codes = np.empty_like(left)
    for start in range(0, len(left), _COLUMNS):
        stop = min(start + _COLUMNS, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for j in range(start, stop):
            codes[j] = _nearest(left[j], scales[j], biases[j], top)
            errors[j - start] = (left[j] - codes[j] * scales[j] - biases[j]) / factor[j, j]
            left[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes[back].T)


def _descended(weight: Floats, hessian: Floats, made: Codes) -> Floats:
    """Each column's codes rounded anew with all others as they are, once through."""
    group, top = made.how.group_size, 2**made.how.bits - 1
    scales = _wide(made.scales, group).T
    codes = np.ascontiguousarray(made.codes.T)
    slope = np.ascontiguousarray(hessian @ (weight - made.dense()).T)  # [n, rows]
    for start in range(0, len(codes), _COLUMNS):
        stop = min(start + _COLUMNS, len(codes))
        moved = np.empty((stop - start, codes.shape[1]), np.float32)
        for j in range(start, stop):
            wanted = codes[j] * scales[j] + slope[j] / hessian[j, j]
            new = np.clip(np.round(wanted / scales[j]), 0, top)
            moved[j - start] = (new - codes[j]) * scales[j]
            codes[j] = new
            slope[start:stop] -= hessian[start:stop, j, None] * moved[j - start]
        rest = np.r_[0:start, stop : len(codes)]
        slope[rest] -= hessian[rest, start:stop] @ moved
    return np.ascontiguousarray(codes.T)


def _refitted(weight: Floats, hessian: Floats, made: Codes) -> Codes:
    """Scales and biases by least squares under the Hessian, the codes as they are."""
    count = made.scales.shape[1]
    each = max(1, _SOLVED_BYTES // (8 * (2 * count) ** 2))
    scales, biases = np.empty_like(made.scales), np.empty_like(made.biases)
    aim = np.asarray((weight - made.dense()) @ hessian, np.float32)
    for start in range(0, len(weight), each):
        rows = slice(start, start + each)
        change = _least_squares(made.codes[rows], aim[rows], hessian, count)
        scales[rows] = made.scales[rows] + change[:, :count]
        biases[rows] = made.biases[rows] + change[:, count:]
    scales, biases = _rounded(scales, made.dtype), _rounded(biases, made.dtype)
    good = np.isfinite(scales) & np.isfinite(biases) & (scales != 0)
    return Codes(
        made.codes,
        np.where(good, scales, made.scales),
        np.where(good, biases, made.biases),
        made.how,
        made.dtype,
    )


def _least_squares(codes: Floats, aim: Floats, hessian: Floats, count: int) -> Floats:
    """What to add to [scales, biases], [rows, 2 * count], given aim = error @ hessian, [rows, n]."""
    rows, n = codes.shape
    group = n // count
    normal = np.empty((rows, 2 * count, 2 * count))
    parts = codes.reshape(rows, count, group)
    for g in range(count):
        span = slice(g * group, (g + 1) * group)
        seen = (codes[:, span] @ hessian[span]).reshape(rows, count, group)
        normal[:, g, :count] = (seen * parts).sum(-1)
        normal[:, g, count:] = seen.sum(-1)
    normal[:, count:, :count] = normal[:, :count, count:].transpose(0, 2, 1)
    normal[:, count:, count:] = hessian.reshape(count, group, count, group).sum((1, 3))
    normal += 1e-6 * np.einsum("rii->ri", normal).mean(-1)[:, None, None] * np.eye(2 * count)
    aims = aim.reshape(rows, count, group)
    right = np.concatenate([(aims * parts).sum(-1), aims.sum(-1)], axis=-1)
    return np.linalg.solve(normal, right[..., None])[..., 0].astype(np.float32)


def _with_codes(made: Codes, codes: Floats) -> Codes:
    return Codes(codes, made.scales, made.biases, made.how, made.dtype)


def _nearest(weight: Floats, scale: Floats, bias: Floats, top: int) -> Floats:
    return np.clip(np.round((weight - bias) / scale), 0, top)


def _wide(values: Floats, group: int) -> Floats:
    return np.repeat(values, group, axis=-1)


def _rounded(values: Floats, dtype: mx.Dtype) -> Floats:
    return np.array(mx.array(values.astype(np.float32)).astype(dtype).astype(mx.float32))

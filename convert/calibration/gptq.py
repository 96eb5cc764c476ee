"""Choosing codes, scales and biases so that the outputs of layers on the inputs that they get change little.

The error of a layer with weights w [rows, n] on inputs x is (w - v) H (w - v)^T summed over its rows,
where v = scale * code + bias are the quantized weights and H [n, n] = sum of x x^T over the inputs, a Metric.
It is made small in turns: scales and biases by search, codes by GPTQ (Frantar et al. 2022,
arXiv:2210.17323) with fixed groups, scales and biases again by least squares under H, codes again by
coordinate descent, which is GPTQ's step repeated with every other code in place (Behdin et al. 2023,
arXiv:2309.01885, "QuantEase").

GPTQ is written by the Cholesky factor of H itself instead of its inverse's, which is half as large: rounding
column after column, against what the errors of those before it have done, is Babai's nearest plane (Chen et
al. 2025, arXiv:2507.18553).

Rows do not depend on each other: all layers that have the same inputs are worked on at once, side by side.
All arrays are float32. Columns are worked on as rows of the transposed matrices, which are contiguous.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx

from convert.calibration.cholesky import COLUMNS
from convert.calibration.grids import refitted, searched
from convert.calibration.matrix import QuantizedMatrix, nearest
from convert.calibration.metric import Metric
from olmo3_mlx.fused import fused
from olmo3_mlx.quantization import Quantization

_PASSES = 2  # refits of scales and codes
_ROUNDS = 3  # from one look whether codes have settled to the next, for which the device has to be waited for


def quantized(
    weights: Sequence[mx.array],
    metric: Metric,
    schemes: Sequence[Quantization],
    dtypes: Sequence[mx.Dtype],
    *,
    passes: int = _PASSES,
) -> list[QuantizedMatrix]:
    """Quantize weights, [rows, n] each, under one metric of n, each by a scheme of its own, with scales and
    biases stored in its dtype. `passes` are refits of scales and codes.
    """
    importance = mx.diag(metric.hessian)
    matrices = [
        searched(weight, importance, scheme, dtype)
        for weight, scheme, dtype in zip(weights, schemes, dtypes, strict=True)
    ]
    matrices = _with_codes(matrices, _gptq(weights, metric, matrices))
    for _ in range(passes):
        pairs = zip(weights, matrices, strict=True)
        matrices = [refitted(weight, metric.hessian, matrix) for weight, matrix in pairs]
        matrices = _with_codes(matrices, _descended(weights, metric.hessian, matrices))
    return matrices


def _with_codes(matrices: Sequence[QuantizedMatrix], codes: mx.array) -> list[QuantizedMatrix]:
    """The matrices with codes [n, all rows]."""
    start, changed = 0, []
    for matrix in matrices:
        stop = start + len(matrix.scales)
        changed.append(replace(matrix, codes=mx.contiguous(codes[:, start:stop].T)))
        start = stop
    mx.eval([matrix.codes for matrix in changed])
    return changed


def _gptq(weights: Sequence[mx.array], metric: Metric, matrices: Sequence[QuantizedMatrix]) -> mx.array:
    """The codes [n, all rows] of GPTQ: column by column it rounds, and those to come make good the error.

    Columns go from the last of the metric's order, the most important, to the first.
    """
    order, tops = metric.order, _tops(matrices)
    errors: list[mx.array] = []
    codes: list[mx.array] = []
    for place, (column, _) in reversed(list(enumerate(metric.parts))):
        size, start = column.shape[1], place * COLUMNS
        unit = column / mx.diag(column[:size])
        weight = _columns(weights, order[start : start + size])
        scales, biases = _grids(matrices, order[start : start + size])
        target = weight + unit[size:].T @ mx.concatenate(errors[::-1]) if errors else weight
        within = mx.tril(unit[:size], -1).T
        again = partial(_column_by_column, weight, target, within, scales, biases, tops)
        codes.append(settled(nearest(target, scales, biases, tops), again))
        errors.append(weight - codes[-1] * scales - biases)
        codes[-1] = codes[-1].astype(mx.uint8)
        mx.eval(errors[-1], codes[-1])
    return mx.concatenate(codes[::-1])[mx.argsort(order)]


@fused
def _column_by_column(*arrays: mx.array) -> mx.array:
    """One round of GPTQ's codes [c, rows] of a part of columns, from those of the round before. Before these
    come the `weight`, the `target` that errors of columns before leave, and what errors `within` the part do
    to each other: [c, c], strictly triangular.
    """
    weight, target, within, scales, biases, tops, codes = arrays
    return nearest(target + within @ (weight - codes * scales - biases), scales, biases, tops)


def _descended(
    weights: Sequence[mx.array], hessian: mx.array, matrices: Sequence[QuantizedMatrix]
) -> mx.array:
    """The codes [n, all rows] after each column was rounded anew, once, with all others as they are."""
    pairs = zip(weights, matrices, strict=True)
    slopes = mx.concatenate([hessian @ (weight - matrix.dense()).T for weight, matrix in pairs], axis=1)
    before = mx.concatenate([matrix.codes.T for matrix in matrices], axis=1)
    mx.eval(slopes, before)
    tops = _tops(matrices)
    moved: list[mx.array] = []
    codes: list[mx.array] = []
    for start in range(0, len(slopes), COLUMNS):
        at = slice(start, start + COLUMNS)
        slope = slopes[at] - hessian[at, :start] @ mx.concatenate(moved) if moved else slopes[at]
        scales, _ = _grids(matrices, mx.arange(start, start + len(slope)))
        square = hessian[at, at]
        within, diagonal = mx.tril(square, -1), mx.diag(square)[:, None]
        again = partial(_move_by_move, before[at], slope, within, diagonal, scales, tops)
        codes.append(settled(before[at], again))
        moved.append((codes[-1] - before[at]) * scales)
        codes[-1] = codes[-1].astype(mx.uint8)
        mx.eval(moved[-1], codes[-1])
    return mx.concatenate(codes)


@fused
def _move_by_move(*arrays: mx.array) -> mx.array:
    """One round of the descent's codes [c, rows] of a part of columns, from those of the round before. Before
    these come the codes that it began with, the `slope` there that moves of columns before leave, and the
    part's Hessian: `within`, [c, c], strictly triangular, and the `diagonal` [c, 1].
    """
    before, slope, within, diagonal, scales, tops, codes = arrays
    slope = slope - within @ ((codes - before) * scales)
    return mx.clip(mx.round(before + slope / (diagonal * scales)), 0, tops)


def settled(codes: mx.array, again: Callable[[mx.array], mx.array]) -> mx.array:
    """The codes [c, rows] of columns that are rounded one after another, each by what those before it did.

    `again` gives all codes from those that it is given, at first `codes`. Column after column would be c
    small steps. All columns at once, again and again until no code changes, end at the same codes, as the
    first column is right after one round, the second after two, ...; and most are right long before: 256
    columns of trained layers take 11 to 38 rounds (Jacobi's iteration: Song et al. 2021, arXiv:2002.03629).
    """
    for done in range(1, len(codes) + 1):
        before, codes = codes, again(codes)
        if done % _ROUNDS == 0 and mx.array_equal(before, codes).item():
            break
    return codes


def _columns(weights: Sequence[mx.array], columns: mx.array) -> mx.array:
    """Some columns of all weights side by side: [columns, all rows]."""
    return mx.concatenate([weight[:, columns].T for weight in weights], axis=1)


def _grids(matrices: Sequence[QuantizedMatrix], columns: mx.array) -> tuple[mx.array, mx.array]:
    """Scales and biases of some columns of all matrices side by side: [columns, all rows] each."""
    grids = [matrix.grid_at(columns) for matrix in matrices]
    scales, biases = ([grid[i] for grid in grids] for i in (0, 1))
    return mx.concatenate(scales, axis=1), mx.concatenate(biases, axis=1)


def _tops(matrices: Sequence[QuantizedMatrix]) -> mx.array:
    return mx.concatenate([mx.full(len(matrix.scales), float(matrix.top)) for matrix in matrices])

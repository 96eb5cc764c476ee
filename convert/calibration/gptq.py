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
from typing import NamedTuple

import mlx.core as mx

from convert.calibration.grids import refitted, searched
from convert.calibration.matrix import QuantizedMatrix, nearest
from convert.calibration.metric import COLUMNS, Metric
from olmo3_mlx.quantization import Quantization

_PASSES = 2  # refits of scales and codes


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
    for place, column in reversed(list(enumerate(metric.columns))):
        size, start = column.shape[1], place * COLUMNS
        unit = column / mx.diag(column[:size])
        weight = _columns(weights, order[start : start + size])
        scales, biases = _grids(matrices, order[start : start + size])
        target = weight + unit[size:].T @ mx.concatenate(errors[::-1]) if errors else weight
        within = mx.tril(unit[:size], -1).T
        step = _GptqStep(weight, target, within, scales, biases, tops)
        codes.append(settled(step.rounded))
        errors.append(step.error(codes[-1]))
        codes[-1] = codes[-1].astype(mx.uint8)
        mx.eval(errors[-1], codes[-1])
    return mx.concatenate(codes[::-1])[mx.argsort(order)]


class _GptqStep(NamedTuple):
    """The columns [c, rows] of a part: their weights, and the `target` that errors of columns before them
    leave; `within` [c, c], strictly triangular, says what their own errors do to each other.
    """

    weight: mx.array
    target: mx.array
    within: mx.array
    scales: mx.array
    biases: mx.array
    tops: mx.array

    def error(self, codes: mx.array) -> mx.array:
        return self.weight - codes * self.scales - self.biases

    def rounded(self, codes: mx.array | None) -> mx.array:
        target = self.target if codes is None else self.target + self.within @ self.error(codes)
        return nearest(target, self.scales, self.biases, self.tops)


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
        step = _DescentStep(before[at], slope, mx.tril(square, -1), mx.diag(square)[:, None], scales, tops)
        codes.append(settled(step.rounded))
        moved.append(step.moved(codes[-1]))
        codes[-1] = codes[-1].astype(mx.uint8)
        mx.eval(moved[-1], codes[-1])
    return mx.concatenate(codes)


class _DescentStep(NamedTuple):
    """The columns [c, rows] of a part: their codes before, and the `slope` that moves of columns before them
    leave; `within` [c, c], strictly triangular, and the `diagonal` [c, 1] are their Hessian.
    """

    before: mx.array
    slope: mx.array
    within: mx.array
    diagonal: mx.array
    scales: mx.array
    tops: mx.array

    def moved(self, codes: mx.array) -> mx.array:
        return (codes - self.before) * self.scales

    def rounded(self, codes: mx.array | None) -> mx.array:
        slope = self.slope if codes is None else self.slope - self.within @ self.moved(codes)
        return mx.clip(mx.round(self.before + slope / (self.diagonal * self.scales)), 0, self.tops)


def settled(step: Callable[[mx.array | None], mx.array]) -> mx.array:
    """The codes [c, rows] of columns that are rounded one after another, each by what those before it did.

    `step` gives all codes from those that it is given (at first None). Column after column would be c small
    steps. All columns at once, again and again until no code changes, end at the same codes, as the first
    column is right after one round, the second after two, ...; and most are right long before: 256 columns
    of trained layers take 11 to 38 rounds (Jacobi's iteration: Song et al. 2021, arXiv:2002.03629).
    """
    codes = step(None)
    for _ in range(len(codes)):
        before, codes = codes, step(codes)
        if mx.array_equal(before, codes).item():
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

"""Large symmetric systems, by matrix products on MLX's device, as its own solvers run on the CPU alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

_DAMPING = 0.01  # of H's mean diagonal, added to it
_COLUMNS = 256  # factored at once
_STEPS = 8  # of conjugate gradients; more change nothing on trained layers (tried up to 64)


class Metric(NamedTuple):
    """The cost of errors in a layer's weights: `hessian` [n, n], divided by the `mean` of its diagonal and
    damped. `factor` is upper triangular, factor^T factor the inverse of the Hessian with rows and columns in
    `order`, the largest diagonal first.
    """

    hessian: mx.array
    mean: float
    order: mx.array
    factor: mx.array

    @classmethod
    def of(cls, hessian: mx.array) -> "Metric":
        """The metric of a hessian [n, n], positive semidefinite; an input that was always 0 is no trouble."""
        mean = float(mx.diag(hessian).mean().item()) or 1.0  # type: ignore[arg-type]
        hessian = with_ridge(hessian / mean, _DAMPING)  # which is let go of: it can have gigabytes
        order = mx.argsort(-mx.diag(hessian))
        mx.eval(hessian, order)
        return cls(hessian, mean, order, _inverse_factor(_cholesky(hessian, order[::-1])))

    def inverse(self, rows: mx.array) -> mx.array:
        """Multiply rows [m, n] by the inverse of the damped Hessian, undivided."""
        product = (rows[:, self.order] @ self.factor.T) @ self.factor
        return product[:, mx.argsort(self.order)] / self.mean


def with_ridge(matrix: mx.array, ridge: float) -> mx.array:
    """`matrix` [n, n] with `ridge` added to its diagonal."""
    count = mx.arange(len(matrix))
    return matrix.at[count, count].add(ridge)


def _cholesky(matrix: mx.array, order: mx.array) -> list[mx.array]:
    """The lower triangular L with L L^T = matrix [n, n], positive definite, its rows and columns in `order`.

    It comes in parts, some columns each, from the diagonal on down: [n, _COLUMNS], [n - _COLUMNS, _COLUMNS],
    ...; the squares on the diagonal are factored in float64.
    """
    columns: list[mx.array] = []
    for start in range(0, len(matrix), _COLUMNS):
        part = order[start : start + _COLUMNS]
        column = matrix[part][:, order[start:]].T
        for place, done in enumerate(columns):
            rows = done[start - place * _COLUMNS :]
            column = column - rows @ rows[: len(part)].T
        corner = np.linalg.cholesky(np.array(column[: len(part)], np.float64))
        below = column[len(part) :] @ _float32(np.linalg.inv(corner).T)
        columns.append(mx.concatenate([_float32(corner), below]))
        mx.eval(columns[-1])
    return columns


def _inverse_factor(columns: list[mx.array]) -> mx.array:
    """The inverse of `_cholesky`'s L read backwards, [n, n]: the upper triangular F with F^T F the inverse of
    what L L^T is read backwards. It takes the columns away, and reads parts backwards as it puts them in
    place, as a whole matrix of a 32B's has 3 GB.
    """
    count, half = len(columns[0]), len(columns) // 2 * _COLUMNS
    first, below, last = _halves(columns)
    columns.clear()
    factor = mx.zeros((count, count))
    end = count - half
    factor[:end, :end] = last[::-1, ::-1]
    mx.eval(factor)
    del last
    if half:
        factor[:end, end:] = below[::-1, ::-1]
        factor[end:, end:] = first[::-1, ::-1]
        mx.eval(factor)
    return factor


def _halves(columns: list[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
    """Three quarters of a lower triangular matrix's inverse: upper left, lower left, lower right. The first
    two are empty if all its columns were factored at once.
    """
    if len(columns) == 1:
        corner = np.tril(np.linalg.inv(np.array(columns[0], np.float64)))
        return mx.zeros((0, 0)), mx.zeros((len(corner), 0)), _float32(corner)
    half = len(columns) // 2
    size = half * _COLUMNS
    first = _inverse([column[: size - place * _COLUMNS] for place, column in enumerate(columns[:half])])
    last = _inverse(columns[half:])
    beneath = [column[size - place * _COLUMNS :] for place, column in enumerate(columns[:half])]
    below = -(last @ mx.concatenate(beneath, axis=1)) @ first
    mx.eval(below)
    return first, below, last


def _inverse(columns: list[mx.array]) -> mx.array:
    """The inverse of a lower triangular matrix [n, n], by halves."""
    first, below, last = _halves(columns)
    beside = mx.zeros((len(first), len(last)))
    whole = mx.concatenate(
        [mx.concatenate([first, beside], axis=1), mx.concatenate([below, last], axis=1)], axis=0
    )
    mx.eval(whole)
    return whole


def _float32(array: np.ndarray[Any, Any]) -> mx.array:
    return mx.array(array.astype(np.float32))


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

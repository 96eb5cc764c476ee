"""Large symmetric systems, by matrix products on MLX's device, as its own solvers run on the CPU alone."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

_DAMPING = 0.01  # of H's mean diagonal, added to it
_BLOCK = 256  # columns factored at once
_STEPS = 8  # of conjugate gradients; more change nothing on trained layers (tried up to 64)


class Metric(NamedTuple):
    """What errors of a layer's weights cost: `hessian` [n, n], divided by `mean`, that of its diagonal, and
    damped. `factor` is upper triangular, factor^T factor the inverse of the Hessian with rows and columns in
    `order`, the largest diagonal first.
    """

    hessian: mx.array
    mean: float
    order: mx.array
    factor: mx.array

    @classmethod
    def of(cls, hessian: mx.array) -> "Metric":
        """Of [n, n], positive semidefinite; an input that was always 0 is no trouble."""
        mean = float(mx.diag(hessian).mean().item()) or 1.0  # type: ignore[arg-type]
        damped = with_ridge(hessian / mean, _DAMPING)
        order = mx.argsort(-mx.diag(damped))
        factor = _inverse_factor(damped[order][:, order])
        mx.eval(damped, order, factor)
        return cls(damped, mean, order, factor)

    def inverse(self, rows: mx.array) -> mx.array:
        """rows [m, n] times the inverse of the damped Hessian, undivided."""
        found = (rows[:, self.order] @ self.factor.T) @ self.factor
        return found[:, mx.argsort(self.order)] / self.mean


def with_ridge(matrix: mx.array, ridge: float) -> mx.array:
    """`matrix` [n, n] with `ridge` added to its diagonal."""
    count = mx.arange(len(matrix))
    return mx.where(count[:, None] == count, matrix + ridge, matrix)


def _inverse_factor(matrix: mx.array) -> mx.array:
    """The upper triangular F with F^T F the inverse of `matrix`: with L L^T = matrix read backwards, F is
    the inverse of L read backwards.
    """
    return _lower_inverse(_cholesky(matrix[::-1, ::-1]))[::-1, ::-1]


def _cholesky(matrix: mx.array) -> mx.array:
    """The lower triangular L with L L^T = matrix, positive definite. The blocks on the diagonal are factored
    in float64.
    """
    columns, rest = [], matrix
    for start in range(0, len(matrix), _BLOCK):
        size = min(_BLOCK, len(rest))
        corner = np.linalg.cholesky(np.array(rest[:size, :size], np.float64))
        below = rest[size:, :size] @ mx.array(np.linalg.inv(corner).T.astype(np.float32))
        column = mx.concatenate([mx.zeros((start, size)), mx.array(corner.astype(np.float32)), below])
        columns.append(column)
        rest = rest[size:, size:] - below @ below.T
        mx.eval(column, rest)
    return mx.concatenate(columns, axis=1)


def _lower_inverse(lower: mx.array) -> mx.array:
    """The inverse of a lower triangular matrix, by halves."""
    if len(lower) <= _BLOCK:
        return mx.array(np.tril(np.linalg.inv(np.array(lower, np.float64))).astype(np.float32))
    half = len(lower) // 2
    first, last = _lower_inverse(lower[:half, :half]), _lower_inverse(lower[half:, half:])
    below = -(last @ lower[half:, :half]) @ first
    whole = mx.concatenate(
        [
            mx.concatenate([first, mx.zeros((half, len(lower) - half))], axis=1),
            mx.concatenate([below, last], axis=1),
        ]
    )
    mx.eval(whole)
    return whole


def solved(times: Callable[[mx.array], mx.array], right: mx.array, diagonal: mx.array) -> mx.array:
    """x with times(x) near to right [rows, a, b], by conjugate gradients for each row, preconditioned with
    the system's `diagonal` [rows, a, b].
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

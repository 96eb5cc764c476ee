"""The cost of errors in a layer's weights, with its Cholesky factor: by matrix products on MLX's device, as
its own solvers run on the CPU alone.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

_DAMPING = 0.01  # of H's mean diagonal, added to it
COLUMNS = 256  # factored at once


@dataclass(frozen=True)
class Metric:
    """The cost of errors in a layer's weights: `hessian` [n, n], divided by the `mean` of its diagonal and
    damped.

    `columns` are the lower triangular L with L L^T = hessian whose rows and columns are in `order`, the
    smallest diagonal first. It comes in parts of COLUMNS columns, from the diagonal on down: [n, COLUMNS],
    [n - COLUMNS, COLUMNS], ...
    """

    hessian: mx.array
    mean: float
    order: mx.array
    columns: tuple[mx.array, ...]

    @classmethod
    def of(cls, hessian: mx.array) -> "Metric":
        """The metric of a hessian [n, n], positive semidefinite; an input that was always 0 is no trouble."""
        mean = float(mx.diag(hessian).mean().item()) or 1.0  # type: ignore[arg-type]
        hessian = with_ridge(hessian / mean, _DAMPING)  # which is let go of: it can have gigabytes
        order = mx.argsort(mx.diag(hessian))
        mx.eval(hessian, order)
        return cls(hessian, mean, order, tuple(_cholesky(hessian, order)))

    def inverse(self, rows: mx.array) -> mx.array:
        """Multiply rows [m, n] by the inverse of the damped Hessian, undivided."""
        left = rows[:, self.order].T / self.mean
        corners = [_inverse_corner(column) for column in self.columns]
        parts = [left[i : i + COLUMNS] for i in range(0, len(left), COLUMNS)]
        for k, column in enumerate(self.columns):  # L y = rows
            parts[k] = corners[k] @ parts[k]
            below = column[column.shape[1] :] @ parts[k]
            for other in range(k + 1, len(parts)):
                at = (other - k - 1) * COLUMNS
                parts[other] = parts[other] - below[at : at + COLUMNS]
            mx.eval(parts)
        for k, column in reversed(list(enumerate(self.columns))):  # L^T x = y
            if k + 1 < len(parts):
                parts[k] = parts[k] - column[column.shape[1] :].T @ mx.concatenate(parts[k + 1 :])
            parts[k] = corners[k].T @ parts[k]
            mx.eval(parts[k])
        return mx.concatenate(parts)[mx.argsort(self.order)].T


def with_ridge(matrix: mx.array, ridge: float) -> mx.array:
    """`matrix` [n, n] with `ridge` added to its diagonal."""
    count = mx.arange(len(matrix))
    return matrix.at[count, count].add(ridge)


def _cholesky(matrix: mx.array, order: mx.array) -> list[mx.array]:
    """The parts of Metric.columns; the squares on the diagonal are factored in float64."""
    columns: list[mx.array] = []
    for start in range(0, len(matrix), COLUMNS):
        part = order[start : start + COLUMNS]
        column = matrix[part][:, order[start:]].T
        for place, done in enumerate(columns):
            rows = done[start - place * COLUMNS :]
            column = column - rows @ rows[: len(part)].T
        corner = np.linalg.cholesky(np.array(column[: len(part)], np.float64))
        below = column[len(part) :] @ _float32(np.linalg.inv(corner).T)
        columns.append(mx.concatenate([_float32(corner), below]))
        mx.eval(columns[-1])
    return columns


def _inverse_corner(column: mx.array) -> mx.array:
    """The inverse of the triangle on the diagonal of a part."""
    corner = np.array(column[: column.shape[1]], np.float64)
    return _float32(np.tril(np.linalg.inv(corner)))


def _float32(array: np.ndarray[Any, Any]) -> mx.array:
    return mx.array(array.astype(np.float32))

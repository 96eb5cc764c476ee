"""Cholesky factors by matrix products on MLX's device, as its own solvers run on the CPU alone."""

from typing import Any

import mlx.core as mx
import numpy as np


def factored(matrix: mx.array, order: mx.array, size: int) -> tuple[mx.array, ...]:
    """The lower triangular L with L L^T = matrix [n, n], positive definite, with its rows and columns in
    `order` [n].

    It comes in parts of `size` columns, from the diagonal on down: [n, size], [n - size, size], ... The
    squares on the diagonal are factored in float64.
    """
    columns: list[mx.array] = []
    for start in range(0, len(matrix), size):
        part = order[start : start + size]
        column = matrix[part][:, order[start:]].T
        for place, done in enumerate(columns):
            rows = done[start - place * size :]
            column = column - rows @ rows[: len(part)].T
        corner = np.linalg.cholesky(np.array(column[: len(part)], np.float64))
        below = column[len(part) :] @ _float32(np.linalg.inv(corner).T)
        columns.append(mx.concatenate([_float32(corner), below]))
        mx.eval(columns[-1])
    return tuple(columns)


def inverse_corner(column: mx.array) -> mx.array:
    """The inverse of the triangle on the diagonal of a part, [size, size]."""
    corner = np.array(column[: column.shape[1]], np.float64)
    return _float32(np.tril(np.linalg.inv(corner)))


def with_ridge(matrix: mx.array, ridge: float) -> mx.array:
    """`matrix` [n, n] with `ridge` added to its diagonal."""
    count = mx.arange(len(matrix))
    return matrix.at[count, count].add(ridge)


def _float32(array: np.ndarray[Any, Any]) -> mx.array:
    return mx.array(array.astype(np.float32))

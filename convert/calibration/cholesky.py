"""Cholesky factors by matrix products on MLX's device, as its own solvers run on the CPU alone."""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

COLUMNS = 256  # of a factor, in one part


class Part(NamedTuple):
    """Some columns of a lower triangular matrix, from the diagonal on down; and the inverse of their triangle
    on the diagonal.
    """

    column: mx.array
    inverse: mx.array

    @property
    def below(self) -> mx.array:
        """The columns below that triangle."""
        return self.column[len(self.inverse) :]


def factored(matrix: mx.array, order: mx.array, size: int) -> tuple[Part, ...]:
    """The lower triangular L with L L^T = matrix [n, n], positive definite, with its rows and columns in
    `order` [n], in parts of `size` columns: [n, size], [n - size, size], ... The squares on the diagonal are
    factored in float64.
    """
    parts: list[Part] = []
    for start in range(0, len(matrix), size):
        chosen = order[start : start + size]
        column = matrix[chosen][:, order[start:]].T
        for place, done in enumerate(parts):
            rows = done.column[start - place * size :]
            column = column - rows @ rows[: len(chosen)].T
        corner = np.linalg.cholesky(np.array(column[: len(chosen)], np.float64))
        inverse = _float32(np.tril(np.linalg.inv(corner)))
        below = column[len(chosen) :] @ inverse.T
        parts.append(Part(mx.concatenate([_float32(corner), below]), inverse))
        mx.eval(parts[-1].column)
    return tuple(parts)


def scaled(matrix: mx.array, ridge: float) -> tuple[mx.array, float]:
    """A positive semidefinite matrix [n, n] over the mean of its diagonal, with `ridge` added to that; and
    the mean. A matrix of zeros is no trouble.
    """
    mean = float(mx.diag(matrix).mean().item()) or 1.0  # type: ignore[arg-type]
    return with_ridge(matrix / mean, ridge), mean


def with_ridge(matrix: mx.array, ridge: float) -> mx.array:
    """`matrix` [n, n] with `ridge` added to its diagonal."""
    count = mx.arange(len(matrix))
    return matrix.at[count, count].add(ridge)


def _float32(array: np.ndarray[Any, Any]) -> mx.array:
    return mx.array(array.astype(np.float32))

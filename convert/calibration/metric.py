"""The cost of errors in a layer's weights by what comes in, with its Cholesky factor."""

from dataclasses import dataclass

import mlx.core as mx

from convert.calibration.cholesky import COLUMNS, Part, factored, scaled

_DAMPING = 0.01  # of H's mean diagonal, added to it


@dataclass(frozen=True)
class Metric:
    """The cost of errors in a layer's weights: `hessian` [n, n], divided by the `mean` of its diagonal and
    damped.

    `parts` are the lower triangular L with L L^T = hessian whose rows and columns are in `order`, the
    smallest diagonal first: COLUMNS columns each.
    """

    hessian: mx.array
    mean: float
    order: mx.array
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, hessian: mx.array) -> "Metric":
        """The metric of a hessian [n, n], positive semidefinite; an input that was always 0 is no trouble."""
        hessian, mean = scaled(hessian, _DAMPING)  # which is let go of: it can have gigabytes
        order = mx.argsort(mx.diag(hessian))
        mx.eval(hessian, order)
        return cls(hessian, mean, order, factored(hessian, order, COLUMNS))

    def inverse(self, rows: mx.array) -> mx.array:
        """Multiply rows [m, n] by the inverse of the damped Hessian, undivided."""
        left = rows[:, self.order].T / self.mean
        found: list[mx.array] = []
        for part in self.parts:  # L y = rows
            found.append(part.inverse @ left[: len(part.inverse)])
            left = left[len(part.inverse) :] - part.below @ found[-1]
            mx.eval(found[-1], left)
        below = mx.zeros((0, len(rows)))
        for part in reversed(self.parts):  # L^T x = y
            above = found.pop()
            if len(below):
                above = above - part.below.T @ below
            below = mx.concatenate([part.inverse.T @ above, below])
            mx.eval(below)
        return below[mx.argsort(self.order)].T

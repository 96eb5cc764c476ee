"""The cost of errors in a layer's weights by what comes in, with its Cholesky factor."""

from dataclasses import dataclass

import mlx.core as mx

from convert.calibration.cholesky import factored, inverse_corner, with_ridge

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
        return cls(hessian, mean, order, factored(hessian, order, COLUMNS))

    def inverse(self, rows: mx.array) -> mx.array:
        """Multiply rows [m, n] by the inverse of the damped Hessian, undivided."""
        left = rows[:, self.order].T / self.mean
        corners = [inverse_corner(column) for column in self.columns]
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

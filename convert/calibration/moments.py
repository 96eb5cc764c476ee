"""What is known of the inputs that layers get: their second moments, and how far they have drifted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from convert.calibration.metric import Metric

_ROWS = 2048  # of a sum, added to at a time
_AIM = 0.5  # how much of earlier layers' errors a layer is to make good

Pairs = Iterator[tuple[mx.array, mx.array]]  # quantized and original inputs, [tokens, n] each


@dataclass(frozen=True)
class Moments:
    """Sums over the inputs of layers that share them: the metric of the sum of x x^T, and how far inputs
    drift: the sum of (original x - x) x^T, where x is the input in the quantized model. `drift` is that,
    [n, n], or `drifts` are its products with layers' weights, [rows, n], by path. Both are over weighted
    tokens.
    """

    metric: Metric
    drift: mx.array | None = None
    drifts: Mapping[str, mx.array] | None = None

    @classmethod
    def of(cls, pairs: Pairs, weights: Mapping[str, mx.array] | None = None) -> "Moments":
        """Sum over pairs of inputs. With `weights`, by path, the drift is kept as their products, which is
        less where they have fewer rows than columns.
        """
        hessian, drift = _Product(), _Product()
        drifts = {path: mx.array(0.0) for path in weights or {}}
        for given, original in pairs:
            hessian.add(given, given)
            if weights is None:
                drift.add(original - given, given)
            for path, weight in (weights or {}).items():
                drifts[path] = drifts[path] + ((original - given) @ weight.T).T @ given
                mx.eval(drifts[path])
        metric = Metric.of(hessian.taken())
        return cls(metric, drift.taken()) if weights is None else cls(metric, drifts=drifts)

    def aimed(self, path: str, rows: slice, weight: mx.array) -> mx.array:
        """Move some rows of the weights at `path`, [rows, n], so that their outputs on the quantized model's
        inputs are nearer to the original outputs.
        """
        if self.drifts is not None:
            error = self.drifts[path][rows]
        elif self.drift is not None:
            error = weight @ self.drift
        else:
            return weight
        aimed = weight + _AIM * self.metric.inverse(error)
        mx.eval(aimed)
        return aimed


class _Product:
    """The sum of a^T b over pairs of a and b, [tokens, n] each: [n, n]. It has gigabytes for wide layers, so
    that it is summed some rows at a time.
    """

    def __init__(self) -> None:
        self._rows: list[mx.array] = []

    def add(self, a: mx.array, b: mx.array) -> None:
        """Add a^T b."""
        mx.eval(a, b)
        for place, start in enumerate(range(0, a.shape[-1], _ROWS)):
            more = a[:, start : start + _ROWS].T @ b
            if place == len(self._rows):
                self._rows.append(more)
            else:
                self._rows[place] = self._rows[place] + more
            mx.eval(self._rows[place])

    def taken(self) -> mx.array:
        """The sum; it is let go of here."""
        rows, self._rows = self._rows, []
        whole = mx.concatenate(rows)
        mx.eval(whole)
        return whole

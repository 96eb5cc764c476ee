"""Making good errors in some of a layer's outputs by others.

GPTQ takes an error in one output for as bad as in any other, and rounds each row of weights by itself. With
the Fisher information O [m, m] of outputs, and H [n, n] of inputs, an error E [m, n] in the weights costs
tr(O E H E^T) (Kronecker-factored: Martens and Grosse 2015, arXiv:1503.05671). So rows are rounded in parts,
one after another, each against what the errors of the parts before it have done, which is GPTQ's step over
rows (Tseng et al. 2025, arXiv:2505.22988, "YAQA", take it over rows and columns at once).
"""

import mlx.core as mx

from convert.calibration.cholesky import COLUMNS, factored, scaled

_PARTS = 3  # more gain a little more, each takes as many small steps as all rows at once
_RIDGE = 0.3  # of the mean diagonal, added to it: a few thousand tokens say little about most directions


class Outputs:
    """The outputs of a layer while its weights [m, n] are rounded, part after part.

    parts  the rows that are rounded together, in their order: from the last on
    """

    def __init__(self, information: mx.array) -> None:
        """`information` is their Fisher information [m, m]."""
        count = len(information)
        self._size = min(COLUMNS, -(-count // _PARTS))
        self._factor = factored(scaled(information, _RIDGE)[0], mx.arange(count), self._size)
        rows = -(-len(self._factor) // _PARTS) * self._size
        self.parts = [slice(start, min(start + rows, count)) for start in reversed(range(0, count, rows))]
        self._errors: list[mx.array] = []  # of the parts that are rounded, in the order of rows

    def target(self, weight: mx.array) -> mx.array:
        """Move the weights [rows, n] of the next part, so that they make good the errors of those before."""
        if not self._errors:
            return weight
        errors, part = list(self._errors), self.parts[len(self._errors)]
        for place in reversed(range(part.start // self._size, -(-part.stop // self._size))):
            factor = self._factor[place]
            errors.insert(0, -(factor.inverse.T @ (factor.below.T @ mx.concatenate(errors))))
            mx.eval(errors[0])
        wanted = mx.concatenate(errors[: -len(self._errors)])
        return weight - wanted

    def add(self, error: mx.array) -> None:
        """Take note of what the weights of the next part lack, [rows, n]."""
        mx.eval(error)
        self._errors.insert(0, error)

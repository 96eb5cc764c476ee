"""Softmax over a vocabulary that comes in pieces, so that no more than a piece of the logits is in memory.

What a softmax over all of it would need, the largest logit and a sum, is carried from piece to piece, as in
Milakov and Gimelshein 2018 (arXiv:1805.02867).
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Softmax:
    """The distributions at some positions as far as the vocabulary has been seen, [P] each, in float64:
    `total` is the sum of exp(logit - largest).
    """

    def __init__(self, positions: int) -> None:
        self.largest: Floats = np.full(positions, -np.inf)
        self.total: Floats = np.zeros(positions)

    def add(self, largest: Floats, total: Floats | float, at: slice = slice(None)) -> tuple[Floats, Floats]:
        """Take in a piece of the vocabulary at the positions `at`, [p]: the `total` of exp(logit - largest)
        over it. Gives two factors, [p]: for sums relative to the largest logit before, and for sums relative
        to that of the piece.
        """
        new = np.maximum(self.largest[at], largest)
        before, now = np.exp(self.largest[at] - new), np.exp(largest - new)
        self.total[at] = self.total[at] * before + total * now
        self.largest[at] = new
        return before, now

    def add_logits(self, logits: mx.array) -> None:
        """Take in a piece of the vocabulary at all positions: its logits [P, R]."""
        self.add(np.array(mx.logsumexp(logits, axis=-1), np.float64), 1.0)

    @property
    def log_total(self) -> Floats:
        """The logsumexp of all logits."""
        return self.largest + np.log(self.total)

    @property
    def normalizer(self) -> mx.array:
        """`log_total` in float32, for use beside logits: exp(logits - normalizer) are probabilities."""
        return mx.array(self.log_total.astype(np.float32))

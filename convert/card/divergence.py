"""The distance between two models' next-token distributions, position by position.

The vocabulary is gone through in pieces (see convert.reading.softmax), so that each head is read once however
many positions there are, and logits of the whole vocabulary never lie in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from convert.reading.layers import Layers
from convert.reading.softmax import Floats, Softmax

HEAD_BYTES = 2**26  # of one head's rows in float32
LOGITS_BYTES = 2**27  # of one model's logits

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Divergence:
    """One value a position, [P] each: KL(original || result) in nats, and for both models the most
    likely token, its probability, and the log-probability of the token that came.
    """

    kl: Floats
    top: tuple[Ids, Ids]
    top_probability: tuple[Floats, Floats]
    log_probability: tuple[Floats, Floats]


class _Predictions:
    """One model's predictions as far as the vocabulary has been seen, [P] each."""

    def __init__(self, positions: int) -> None:
        self.softmax = Softmax(positions)
        self.top: Ids = np.zeros(positions, np.int64)  # the most likely token
        self.actual: Floats = np.zeros(positions)  # the logit of the token that came

    def add(self, at: slice, logits: mx.array, start: int, actual: Ids) -> tuple[Floats, Floats]:
        """Take in the logits [p, R] of tokens from `start` on, at some positions. Gives the two factors of
        Softmax.add, [p] each.
        """
        inside = (actual >= start) & (actual < start + logits.shape[-1])
        column = mx.array(np.where(inside, actual - start, 0))[:, None]
        highest = logits.max(-1, keepdims=True)
        largest, total, top, value = _numpy(
            highest[:, 0],
            mx.exp(logits - highest).sum(-1),
            logits.argmax(-1),
            mx.take_along_axis(logits, column, axis=-1)[:, 0],
        )
        higher = largest > self.softmax.largest[at]
        self.top[at] = np.where(higher, start + top.astype(np.int64), self.top[at])
        self.actual[at] = np.where(inside, value, self.actual[at])
        return self.softmax.add(largest, total, at)

    @property
    def top_probability(self) -> Floats:
        """The probability of the most likely token."""
        return 1 / self.softmax.total

    @property
    def log_probability(self) -> Floats:
        """The log-probability of the token that came."""
        return self.actual - self.softmax.log_total


def divergence(
    original: Layers,
    result: Layers,
    hidden: tuple[mx.array, mx.array],
    actual: Ids,
    progress: Callable[[int], None] = lambda weights: None,
) -> Divergence:
    """Compare what both models' heads predict from `hidden`, [P, hidden] each, which came out of their last
    blocks; `actual` [P] are the tokens that came next. `progress` is told how many weights were read.
    """
    positions, width = hidden[0].shape
    states = (original.final_norm(hidden[0]), result.final_norm(hidden[1]))
    mx.eval(states)
    first, second = _Predictions(positions), _Predictions(positions)
    crossed: Floats = np.zeros(positions)  # sum of exp(logit - largest) * (logit - the other's logit)
    rows, vocabulary = max(1, HEAD_BYTES // (4 * width)), original.config.vocab_size
    for start in range(0, vocabulary, rows):
        stop = min(start + rows, vocabulary)
        heads = [layers.head.rows(start, stop).astype(mx.float32).T for layers in (original, result)]
        many = max(1, LOGITS_BYTES // (4 * (stop - start)))
        for begin in range(0, positions, many):
            at = slice(begin, min(begin + many, positions))
            ours, theirs = states[0][at] @ heads[0], states[1][at] @ heads[1]
            weights = mx.exp(ours - ours.max(-1, keepdims=True))
            (cross,) = _numpy((weights * (ours - theirs)).sum(-1))
            before, now = first.add(at, ours, start, actual[at])
            crossed[at] = crossed[at] * before + cross * now
            second.add(at, theirs, start, actual[at])
        progress(2 * width * (stop - start))
    kl = crossed / first.softmax.total - (first.softmax.log_total - second.softmax.log_total)
    return Divergence(
        kl=np.where(kl < 0, 0.0, kl),  # rounding can leave -1e-7; NaN stays
        top=(first.top, second.top),
        top_probability=(first.top_probability, second.top_probability),
        log_probability=(first.log_probability, second.log_probability),
    )


def _numpy(*arrays: mx.array) -> list[Floats]:
    mx.eval(arrays)
    return [np.array(array, np.float64) for array in arrays]

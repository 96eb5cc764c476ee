"""How far two models' next-token distributions are apart, position by position, in one reading of both heads.

The vocabulary is gone through in pieces: what a softmax over all of it would need (largest logit, sums) is
carried from piece to piece, as in Milakov and Gimelshein 2018 (arXiv:1805.02867), so that each head is read
once however many positions there are, and logits of the whole vocabulary never lie in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from convert.reading.layers import Layers

HEAD_BYTES = 2**26  # of one head's rows in float32
LOGITS_BYTES = 2**27  # of one model's logits

Floats = NDArray[np.float64]
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


class _Softmax:
    """One model's distributions as far as the vocabulary has been seen, [P] each, in float64."""

    def __init__(self, positions: int) -> None:
        self.largest: Floats = np.full(positions, -np.inf)
        self.total: Floats = np.zeros(positions)  # of exp(logit - largest)
        self.top: Ids = np.zeros(positions, np.int64)
        self.actual: Floats = np.zeros(positions)  # the logit of the token that came

    def add(self, at: slice, logits: mx.array, start: int, actual: Ids) -> tuple[Floats, Floats]:
        """Take in the logits [p, R] of tokens from `start` on, at some positions. Two factors, [p]: for sums
        relative to the largest logit so far, and for those relative to the largest of `logits`.
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
        new = np.maximum(self.largest[at], largest)
        before, now = np.exp(self.largest[at] - new), np.exp(largest - new)
        self.total[at] = self.total[at] * before + total * now
        self.top[at] = np.where(largest > self.largest[at], start + top.astype(np.int64), self.top[at])
        self.actual[at] = np.where(inside, value, self.actual[at])
        self.largest[at] = new
        return before, now

    @property
    def log_total(self) -> Floats:
        """logsumexp of all logits."""
        return self.largest + np.log(self.total)


def divergence(
    original: Layers,
    result: Layers,
    hidden: tuple[mx.array, mx.array],
    actual: Ids,
    progress: Callable[[int], None] = lambda weights: None,
) -> Divergence:
    """Compare what both models' heads make of `hidden`, [P, hidden] each, which came out of their last
    blocks; `actual` [P] are the tokens that came next. `progress` is told how many weights were read.
    """
    positions, width = hidden[0].shape
    states = (original.final_norm(hidden[0]), result.final_norm(hidden[1]))
    mx.eval(states)
    first, second = _Softmax(positions), _Softmax(positions)
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
    kl = crossed / first.total - (first.log_total - second.log_total)
    return Divergence(
        kl=np.where(kl < 0, 0.0, kl),  # rounding can leave -1e-7; NaN stays
        top=(first.top, second.top),
        top_probability=(1 / first.total, 1 / second.total),
        log_probability=(first.actual - first.log_total, second.actual - second.log_total),
    )


def _numpy(*arrays: mx.array) -> list[Floats]:
    mx.eval(arrays)
    return [np.array(array, np.float64) for array in arrays]

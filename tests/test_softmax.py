"""Softmax over pieces of a vocabulary is softmax over all of it."""

import mlx.core as mx
import numpy as np
import pytest

from convert.reading.softmax import Softmax


@pytest.fixture(scope="module")
def logits() -> mx.array:
    """Of 5 positions over 1000 tokens, some positions far above others."""
    drawn = np.random.default_rng(0).normal(size=(5, 1000)) * 4 + np.array([[0], [80], [-80], [3], [0]])
    return mx.array(drawn.astype(np.float32))


@pytest.mark.parametrize("width", [1, 7, 999, 1000])
def test_the_logsumexp_of_pieces_is_that_of_the_whole(logits: mx.array, width: int) -> None:
    softmax = Softmax(5)
    for start in range(0, 1000, width):
        softmax.add_logits(logits[:, start : start + width])
    exact = np.logaddexp.reduce(np.array(logits, np.float64), axis=-1)
    assert np.abs(softmax.log_total - exact).max() < 1e-5
    chances = mx.exp(logits - softmax.normalizer[:, None])
    assert np.abs(np.array(chances.sum(-1)) - 1).max() < 1e-5


def test_a_single_piece_is_mlxs_own_logsumexp_to_the_bit(logits: mx.array) -> None:
    softmax = Softmax(5)
    softmax.add_logits(logits)
    assert mx.array_equal(softmax.normalizer, mx.logsumexp(logits, axis=-1)).item()


def test_sums_are_carried_from_piece_to_piece_at_the_positions_that_a_piece_is_for(logits: mx.array) -> None:
    """The mean logit of each distribution, exact to float64."""
    exact = np.array(logits, np.float64)
    softmax, sums = Softmax(5), np.zeros(5)
    for start in range(0, 1000, 90):
        for at in (slice(0, 2), slice(2, 5)):
            piece = exact[at, start : start + 90]
            largest = piece.max(-1)
            weights = np.exp(piece - largest[:, None])
            before, now = softmax.add(largest, weights.sum(-1), at)
            sums[at] = sums[at] * before + (weights * piece).sum(-1) * now
    weights = np.exp(exact - exact.max(-1, keepdims=True))
    assert np.allclose(sums / softmax.total, (weights * exact).sum(-1) / weights.sum(-1), rtol=1e-13)
    assert np.allclose(softmax.log_total, np.logaddexp.reduce(exact, axis=-1), rtol=1e-13)

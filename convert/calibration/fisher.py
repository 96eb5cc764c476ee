"""The cost of an error in the embedding: the Fisher information of the hidden states that enter the model."""

import mlx.core as mx

from convert.calibration.metric import with_ridge
from convert.reading.layers import Layers, States, run, split
from convert.reading.softmax import Softmax
from convert.reading.source import Source
from olmo3_mlx.model import Block

_STATES_BYTES = 2**31  # of the hidden states between all blocks
_TOKENS = 4096  # looked at, at most
_RIDGE = 0.1  # of the mean diagonal, added to it: few draws say little about some directions


def embedding_hessian(source: Source, tokens: mx.array) -> mx.array:
    """The sum of g g^T over some of tokens [N, L], with a ridge: [n, n]. g [n] is the gradient of a loss by
    the hidden state that the embedding gives for a token: an error e in it adds about e^T g g^T e / 2 to the
    KL divergence.

    The loss is that of next tokens drawn from the model's own distributions, which makes the mean of g g^T
    the Fisher information (Martens 2014, arXiv:1412.1193, section 5). One pass forward and one back, a block
    at a time.
    """
    layers = Layers(source)
    state = 4 * source.config.hidden_size * tokens.shape[1] * (layers.count + 1)
    text = tokens[: max(1, min(_STATES_BYTES // state, _TOKENS // tokens.shape[1]))]
    states = [split(layers.embed(text))]
    for index in range(layers.count):
        states.append(run(layers.block(index), states[-1]))
    slopes = split(_slope(layers, mx.concatenate(states.pop())))
    for index in reversed(range(layers.count)):
        slopes = _back(layers.block(index), states.pop(), slopes)
    flat = mx.concatenate(slopes, axis=1)[0]
    hessian = flat.T @ flat
    return with_ridge(hessian, _RIDGE * float(mx.diag(hessian).mean().item()))  # type: ignore[arg-type]


def _back(block: Block, states: States, slopes: States) -> States:
    """The gradients by the `states` that go into `block`, from the gradients by those that come out."""
    before = []
    for state, slope in zip(states, slopes, strict=True):
        before += mx.vjp(lambda x: block(x, None), [state], [slope])[1]
        mx.eval(before[-1])
    return before


def _slope(layers: Layers, hidden: mx.array) -> mx.array:
    """The gradient of the loss by the hidden states [N, L, n] that came out of the last block.

    By the head's input it is the mean of the head's rows that the model expects, less the row that was drawn.
    The head is read twice, in pieces; the largest of the logits with Gumbel noise is a draw from all of them.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    normed = layers.final_norm(flat)
    softmax, highest, drawn = Softmax(len(flat)), mx.full(len(flat), -mx.inf), mx.zeros_like(flat)
    for place, rows in enumerate(layers.head_pieces()):
        logits = normed @ rows.T
        softmax.add_logits(logits)
        noisy = logits + mx.random.gumbel(logits.shape, key=mx.random.key(place))
        drawn = mx.where((noisy.max(-1) > highest)[:, None], rows[noisy.argmax(-1)], drawn)
        highest = mx.maximum(highest, noisy.max(-1))
        mx.eval(highest, drawn)
    expected, normalizer = mx.zeros_like(flat), softmax.normalizer[:, None]
    for rows in layers.head_pieces():
        expected += mx.exp(normed @ rows.T - normalizer) @ rows
        mx.eval(expected)
    _, (slope,) = mx.vjp(layers.final_norm, [flat], [expected - drawn])
    return slope.reshape(hidden.shape)

"""What an error in the embedding costs at the end: the Fisher information of the hidden states that go in."""

import mlx.core as mx
import numpy as np

from convert.calibration.gptq import Floats
from convert.layers import Layers
from convert.source import Source

_STATES_BYTES = 2**31  # of the hidden states between all blocks
_TOKENS = 4096  # looked at, at most
_POSITIONS = 512  # of the head's at once
_RIDGE = 0.1  # of the mean diagonal, added to it: few draws say little about some directions


def embedding_hessian(source: Source, tokens: mx.array) -> Floats:
    """[n, n], the sum of g g^T over some of tokens [N, L], and a ridge: g [n] is the gradient of a loss by
    what the embedding gives for a token. An error e there adds about e^T g g^T e / 2 to the KL divergence.

    The loss is that of next tokens drawn from the model's own distributions, which makes the mean of g g^T
    the Fisher information (Martens 2014, arXiv:1412.1193, section 5). One pass forward and one back, a block
    at a time.
    """
    layers = Layers(source)
    state = 4 * source.config.hidden_size * tokens.shape[1] * (layers.count + 1)
    text = tokens[: max(1, min(_STATES_BYTES // state, _TOKENS // tokens.shape[1]))]
    states = [layers.embed(text)]
    for index in range(layers.count):
        states.append(layers.block(index)(states[-1], None))
        mx.eval(states[-1])
    slope = _slope(layers, states.pop())
    for index in reversed(range(layers.count)):
        block = layers.block(index)
        _, (slope,) = mx.vjp(lambda x, block=block: block(x, None), [states.pop()], [slope])
        mx.eval(slope)
    flat = np.array(slope.reshape(-1, slope.shape[-1]))
    hessian = flat.T @ flat
    hessian += _RIDGE * np.mean(np.diag(hessian)) * np.eye(len(hessian), dtype=np.float32)
    return np.asarray(hessian, np.float32)


def _slope(layers: Layers, hidden: mx.array) -> mx.array:
    """The gradient of the loss by what came out of the last block, hidden [N, L, n]."""
    head = layers.weight(layers.head_name)
    flat = hidden.reshape(-1, hidden.shape[-1])
    found = []
    for start in range(0, len(flat), _POSITIONS):
        part = flat[start : start + _POSITIONS]
        drawn = mx.random.categorical(layers.final_norm(part) @ head.T, key=mx.random.key(start))

        def loss(x: mx.array, drawn: mx.array = drawn) -> mx.array:
            logits = layers.final_norm(x) @ head.T
            actual = mx.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
            return (mx.logsumexp(logits, axis=-1) - actual).sum()

        found.append(mx.grad(loss)(part))
        mx.eval(found[-1])
    return mx.concatenate(found).reshape(hidden.shape)

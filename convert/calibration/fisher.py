"""The cost of an error in the embedding: the Fisher information of the hidden states that enter the model."""

import mlx.core as mx

from convert.calibration.gradients import back, last_gradients, states_between
from convert.calibration.metric import with_ridge
from convert.reading.layers import Layers
from convert.reading.source import Source

_STATES_BYTES = 2**31  # of the hidden states between all blocks
_TOKENS = 4096  # looked at, at most
_RIDGE = 0.1  # of the mean diagonal, added to it: few draws say little about some directions


def embedding_hessian(source: Source, tokens: mx.array) -> mx.array:
    """The sum of g g^T over some of tokens [N, L], with a ridge: [n, n], where g [n] is the gradient of
    convert.calibration.gradients by the hidden state that the embedding gives for a token.
    """
    layers = Layers(source)
    state = 4 * source.config.hidden_size * tokens.shape[1] * (layers.count + 1)
    text = tokens[: max(1, min(_STATES_BYTES // state, _TOKENS // tokens.shape[1]))]
    states = states_between(layers, text)
    gradients = last_gradients(layers, states.pop())
    for index in reversed(range(layers.count)):
        gradients = back(layers.block(index), states.pop(), gradients)
    flat = mx.concatenate(gradients, axis=1)[0]
    hessian = flat.T @ flat
    return with_ridge(hessian, _RIDGE * float(mx.diag(hessian).mean().item()))  # type: ignore[arg-type]

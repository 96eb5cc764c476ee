"""Gradients of a loss by hidden states and by the outputs of layers, one block at a time.

The loss is that of next tokens drawn from the model's own distributions, which makes the mean of g g^T,
with g the gradient by some vector, that vector's Fisher information: an error e in it adds about
e^T g g^T e / 2 to the KL divergence (Martens 2014, arXiv:1412.1193, section 5).
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from convert.progress import untold
from convert.reading.layers import BLOCK_LAYERS, Layers, States, layer_of, replaced, run, split
from convert.reading.softmax import Softmax
from olmo3_mlx.model import Block

_STATES_BYTES = 2**31  # of the hidden states between all blocks


class AtLayer(NamedTuple):
    """A layer's inputs [L, n], its outputs [L, m], and the gradient by these."""

    inputs: mx.array
    outputs: mx.array
    gradient: mx.array


def that_fit(layers: Layers, tokens: mx.array, most: int) -> mx.array:
    """The first sequences of tokens [N, L], as many as memory allows for their states between all blocks; at
    least one, and at most `most`.
    """
    state = 4 * layers.config.hidden_size * tokens.shape[1] * (layers.count + 1)
    return tokens[: max(1, min(_STATES_BYTES // state, most))]


def states_between(layers: Layers, tokens: mx.array, passed: Callable[[int], None] = untold) -> list[States]:
    """The hidden states before each block, and behind the last one, on tokens [N, L]. `passed` is told of the
    weights of each block.
    """
    states = [split(layers.embed(tokens))]
    for index in range(layers.count):
        states.append(run(layers.block(index), states[-1]))
        passed(layers.block_weights(index))
    return states


def last_gradients(layers: Layers, hidden: States, passed: Callable[[int], None] = untold) -> States:
    """The gradients of the loss by the states that came out of the last block. `passed` is told of the
    weights of each piece of the head.

    By the head's input it is the mean of the head's rows that the model expects, less the row that was drawn.
    The head is read twice, in pieces; the largest of the logits with Gumbel noise is a draw from all of them.
    """
    shape = (len(hidden), *hidden[0].shape[1:])
    flat = mx.concatenate(hidden).reshape(-1, shape[-1])
    normed = layers.final_norm(flat)
    softmax, highest, drawn = Softmax(len(flat)), mx.full(len(flat), -mx.inf), mx.zeros_like(flat)
    for place, rows in enumerate(layers.head_pieces()):
        logits = normed @ rows.T
        softmax.add_logits(logits)
        noisy = logits + mx.random.gumbel(logits.shape, key=mx.random.key(place))
        drawn = mx.where((noisy.max(-1) > highest)[:, None], rows[noisy.argmax(-1)], drawn)
        highest = mx.maximum(highest, noisy.max(-1))
        mx.eval(highest, drawn)
        passed(rows.size)
    expected, normalizer = mx.zeros_like(flat), softmax.normalizer[:, None]
    for rows in layers.head_pieces():
        expected += mx.exp(normed @ rows.T - normalizer) @ rows
        mx.eval(expected)
        passed(rows.size)
    _, (gradient,) = mx.vjp(layers.final_norm, [flat], [expected - drawn])
    return split(gradient.reshape(shape))


def back(block: Block, states: States, gradients: States) -> States:
    """The gradients by the `states` that go into `block`, from the gradients by those that come out."""
    before = []
    for state, gradient in zip(states, gradients, strict=True):
        before += mx.vjp(lambda x: block(x, None), [state], [gradient])[1]
        mx.eval(before[-1])
    return before


def back_by_layer(block: Block, state: mx.array, gradient: mx.array) -> tuple[mx.array, dict[str, AtLayer]]:
    """The same for one sequence, and what goes into each of the block's layers with the gradients by what
    comes out.
    """
    by_name = {name: _Probe(layer_of(block, name)) for name in BLOCK_LAYERS}
    probes = list(by_name.values())
    with replaced(block, by_name):
        block(state, None)
        seen = [probe.seen for probe in probes]
        mx.eval(seen)

        def through(x: mx.array, *offsets: mx.array) -> mx.array:
            for probe, offset in zip(probes, offsets, strict=True):
                probe.offset = offset
            return block(x, None)

        zeros = [mx.zeros_like(outputs) for _, outputs in seen]
        _, (before, *slopes) = mx.vjp(through, [state, *zeros], [gradient])
    mx.eval(before, slopes)
    each = zip(BLOCK_LAYERS, seen, slopes, strict=True)
    return before, {name: AtLayer(x[0], y[0], slope[0]) for name, (x, y), slope in each}


class _Probe(nn.Module):
    """A layer that remembers what goes in and what comes out, or adds an offset to what comes out."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = layer
        self.offset: mx.array | None = None
        self.seen: tuple[mx.array, mx.array] = (mx.array(0.0), mx.array(0.0))

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self._layer(x)
        if self.offset is not None:
            return y + self.offset
        self.seen = (x, y)
        return y

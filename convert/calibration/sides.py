"""A block of the original or of the quantized model, and the hidden states on their way through it.

Layers are quantized in four steps, each of which needs the inputs of its layers. Attention is computed once
for all of them, and the states that it leaves take the place of those before.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from convert.calibration.moments import Pairs
from convert.reading.layers import States
from olmo3_mlx.model import Block


class Side:
    """`states` go into the layer that is next: into the block, then into its feed-forward, then out of it.
    `attended` are the inputs of o_proj in between.
    """

    def __init__(self, block: Block, states: States) -> None:
        self.block, self.states = block, states
        self.attended: States = []

    def load(self, weights: Mapping[str, mx.array]) -> None:
        """Put weights into layers of the block, by their names in it."""
        self.block.load_weights(
            [(f"{name}.weight", weight) for name, weight in weights.items()], strict=False
        )
        mx.eval(self.block.parameters())

    def attend(self) -> None:
        """Compute the inputs of o_proj, once queries, keys and values are what they will be."""
        with _without(self.block.self_attn, "o_proj"):
            self.attended = _evaluated(self.block.self_attn(x, None) for x in self.states)

    def add_attention(self) -> None:
        """Go past o_proj and its norm, to the inputs of the feed-forward."""
        o_proj, norm = self.block.self_attn.o_proj, self.block.post_attention_layernorm
        for i, attended in enumerate(self.attended):
            self.states[i] = self.states[i] + norm(o_proj(attended))
            mx.eval(self.states[i])
        self.attended = []

    def activated(self, index: int) -> mx.array:
        """The input of down_proj for one of the sequences, lazily."""
        with _without(self.block.mlp, "down_proj"):
            out: mx.array = self.block.mlp(self.states[index])
        return out

    def add_feed_forward(self) -> None:
        """Go past the feed-forward, out of the block."""
        for i, x in enumerate(self.states):
            self.states[i] = x + self.block.post_feedforward_layernorm(self.block.mlp(x))
            mx.eval(self.states[i])


class Sides:
    """The same block of both models. Inputs come in pairs, quantized and original, [tokens, n] each, one
    sequence at a time.
    """

    def __init__(self, original: Side, written: Side) -> None:
        self.original, self.written = original, written

    def states(self) -> Pairs:
        """The states, as layers take them that no norm follows, or one over queries or keys alone."""
        for x, y in zip(self.written.states, self.original.states, strict=True):
            yield flat(x), flat(y)

    def attended(self) -> Pairs:
        """The inputs of o_proj."""
        weight = self.original.block.self_attn.o_proj.weight
        for x, y in zip(self.written.attended, self.original.attended, strict=True):
            yield self._normed(weight, flat(x), flat(y))

    def activated(self) -> Pairs:
        """The inputs of down_proj."""
        weight = self.original.block.mlp.down_proj.weight
        for i in range(len(self.written.states)):
            yield self._normed(weight, flat(self.written.activated(i)), flat(self.original.activated(i)))

    def attend(self) -> None:
        """Compute the inputs of o_proj."""
        for side in (self.original, self.written):
            side.attend()

    def add_attention(self) -> None:
        """Go past o_proj and its norm."""
        for side in (self.original, self.written):
            side.add_attention()

    def add_feed_forward(self) -> None:
        """Go past the feed-forward, out of the block."""
        for side in (self.original, self.written):
            side.add_feed_forward()

    def _normed(self, weight: mx.array, given: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
        """Each token's inputs over the size of its original output, as the norm behind the layer has it."""
        output = wanted @ weight.T
        eps = self.original.block.post_attention_layernorm.eps
        size = mx.sqrt(mx.square(output).mean(-1, keepdims=True) + eps)
        return given / size, wanted / size


def flat(x: mx.array) -> mx.array:
    """Reshape [..., n] to [tokens, n]."""
    return x.reshape(-1, x.shape[-1])


def _evaluated(states: Iterator[mx.array]) -> States:
    """The states, computed one after another, so that a block's temporaries are small."""
    kept = []
    for state in states:
        mx.eval(state)
        kept.append(state)
    return kept


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Take layer `name` out of `module`: it gives back its input."""
    layer = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, layer)

"""A block of one of two models, the original or the quantized one, and the hidden states on their way through it.

Layers are quantized in four steps, each of which needs the inputs of its layers. Attention is computed once for
all of them, and the states that it leaves take the place of those before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from convert.reading.layers import States
from olmo3_mlx.model import Block


class Side:
    """`states` go into the layer that is next: into the block, then into its feed-forward, then out of it.
    `attended` are the inputs of o_proj in between.
    """

    def __init__(self, block: Block, states: States) -> None:
        self.block, self.states = block, states
        self.attended: States = []

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

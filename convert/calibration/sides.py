"""A block of the original or of the quantized model, and the hidden states on their way through it.

Layers are quantized in four steps, each of which needs the inputs of its layers. Attention is computed once
for all of them, and the states that it leaves take the place of those before. A layer's weights are read when
a pass needs them and let go of after it, as a 32B's feed-forward has 1.7 GB in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.calibration.moments import Pairs
from convert.reading.layers import (
    ATTENDING,
    BLOCK_LAYERS,
    DOWN,
    GATE,
    OUT,
    UP,
    States,
    layer_of,
    replaced,
    size_before_norm,
)
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.model import Block

Read = Callable[[str], mx.array]  # the name of a weight in a block -> its values in float32


class Side:
    """`states` go into the layers that are next: into the block, then into its feed-forward, then out of it.
    `attended` are the inputs of o_proj in between.
    """

    def __init__(self, config: Olmo3Config, index: int, read: Read, states: States) -> None:
        """Block `index`, whose weights are read by `read`."""
        self._block = Block(config, config.layer_types[index])
        self._read = read
        self.states = states
        self.attended: States = []
        names = list(dict(tree_flatten(self._block.parameters())))
        norms = [name for name in names if name.removesuffix(".weight") not in BLOCK_LAYERS]
        self._block.load_weights([(name, read(name)) for name in norms], strict=False)
        self._let_go_of(BLOCK_LAYERS)

    def weight(self, name: str) -> mx.array:
        """Read the weight of one of its layers."""
        return self._read(f"{name}.weight")

    def attend(self) -> None:
        """Compute the inputs of o_proj, once queries, keys and values are what they will be."""
        with self._reading(*ATTENDING), self._without(OUT):
            self.attended = []
            for state in self.states:
                self.attended.append(self._block.self_attn(state, None))
                mx.eval(self.attended[-1])

    def add_attention(self) -> None:
        """Go past o_proj and its norm, to the inputs of the feed-forward."""
        norm = self._block.post_attention_layernorm
        with self._reading(OUT):
            for i, attended in enumerate(self.attended):
                self.states[i] = self.states[i] + norm(self._block.self_attn.o_proj(attended))
                mx.eval(self.states[i])
        self.attended = []

    def activated(self) -> Iterator[mx.array]:
        """The inputs of down_proj, one sequence after another, lazily."""
        with self._reading(GATE, UP), self._without(DOWN):
            for state in self.states:
                yield self._block.mlp(state)

    def add_feed_forward(self) -> None:
        """Go past the feed-forward, out of the block."""
        norm = self._block.post_feedforward_layernorm
        with self._reading(GATE, UP, DOWN):
            for i, state in enumerate(self.states):
                self.states[i] = state + norm(self._block.mlp(state))
                mx.eval(self.states[i])

    @contextmanager
    def _reading(self, *names: str) -> Iterator[None]:
        weights = [(f"{name}.weight", self.weight(name)) for name in names]
        mx.eval([weight for _, weight in weights])
        self._block.load_weights(weights, strict=False)
        del weights
        try:
            yield
        finally:
            self._let_go_of(names)

    def _without(self, name: str) -> AbstractContextManager[None]:
        """Take a layer out: it gives back its input."""
        return replaced(self._block, {name: nn.Identity()})

    def _let_go_of(self, names: tuple[str, ...]) -> None:
        for name in names:
            layer_of(self._block, name).weight = mx.zeros((0,))


class Sides:
    """The same block of both models. Inputs come in pairs, quantized and original, [tokens, n] each, one
    sequence at a time.
    """

    def __init__(self, original: Side, written: Side, eps: float) -> None:
        """`eps` is that of the norms."""
        self._original, self._written, self._eps = original, written, eps

    def states(self) -> Pairs:
        """The states, as layers take them that no norm follows, or one over queries or keys alone."""
        for x, y in zip(self._written.states, self._original.states, strict=True):
            yield flat(x), flat(y)

    def attended(self) -> Pairs:
        """The inputs of o_proj."""
        weight = self._original.weight(OUT)
        for x, y in zip(self._written.attended, self._original.attended, strict=True):
            yield self._normed(weight, flat(x), flat(y))

    def activated(self) -> Pairs:
        """The inputs of down_proj."""
        weight = self._original.weight(DOWN)
        for x, y in zip(self._written.activated(), self._original.activated(), strict=True):
            yield self._normed(weight, flat(x), flat(y))

    def attend(self) -> None:
        """Compute the inputs of o_proj."""
        for side in (self._original, self._written):
            side.attend()

    def add_attention(self) -> None:
        """Go past o_proj and its norm."""
        for side in (self._original, self._written):
            side.add_attention()

    def add_feed_forward(self) -> None:
        """Go past the feed-forward, out of the block."""
        for side in (self._original, self._written):
            side.add_feed_forward()

    def _normed(self, weight: mx.array, given: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
        """Each token's inputs over the size of its original output, as the norm behind the layer has it."""
        output = wanted @ weight.T
        size = size_before_norm(output, self._eps)
        return given / size, wanted / size


def flat(x: mx.array) -> mx.array:
    """Reshape [..., n] to [tokens, n]."""
    return x.reshape(-1, x.shape[-1])

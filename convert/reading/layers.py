"""A checkpoint run one block at a time: the way to see what a model does that does not fit into memory.

    layers = Layers(Source.open(folder))
    states = split(layers.embed(tokens))             # [N, L] -> N times [1, L, hidden]
    for index in range(layers.count):
        states = run(layers.block(index), states)
    hidden = layers.final_norm(states[0])            # [1, L, hidden]
    logits = [hidden @ rows.T for rows in layers.head_pieces()]

In float32, whatever the weights are stored in. Needs memory for one block, or for the rows of the
embedding and of the head that are read at once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from convert.reading.source import Source
from convert.reading.stored import Tensor, read
from olmo3_mlx.model import Block
from olmo3_mlx.token_ids import check_token_ids

_ROWS_BYTES = 2**27  # of the head in float32, read at once

ATTENDING = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # they take what the block takes
OUT, GATE, UP, DOWN = "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
BLOCK_LAYERS = (*ATTENDING, OUT, GATE, UP, DOWN)  # the linear ones, as states go through them

States = list[mx.array]  # hidden states, one [1, L, hidden] a sequence


class Layers:
    """The parts of the model in `source`, each read when it is asked for."""

    def __init__(self, source: Source) -> None:
        self.config = source.config
        self._tensors: Mapping[str, Tensor] = source.tensors

    @property
    def count(self) -> int:
        """The number of blocks."""
        return self.config.num_hidden_layers

    def embed(self, tokens: mx.array) -> mx.array:
        """Look tokens [B, L] up in the embedding: [B, L, hidden]. Raises PromptError for an id outside the
        vocabulary.
        """
        check_token_ids(tokens, self.config.vocab_size)
        table = self._tensors["model.embed_tokens.weight"]
        ids, places = np.unique(np.array(tokens), return_inverse=True)
        rows = [table.rows(token, token + 1).astype(mx.float32) for token in map(int, ids)]
        hidden = mx.concatenate(rows)[mx.array(places)].reshape(*tokens.shape, -1)
        mx.eval(hidden)
        return hidden

    def block(self, index: int) -> Block:
        """Read block `index`; called with [B, L, hidden] and None, it gives [B, L, hidden]."""
        block = Block(self.config, self.config.layer_types[index])
        names = dict(tree_flatten(block.parameters()))
        block.load_weights([(name, self.weight(f"model.layers.{index}.{name}")) for name in names])
        return block

    def block_weights(self, index: int) -> int:
        """The number of weights in block `index`."""
        start = f"model.layers.{index}."
        return sum(prod(tensor.shape) for name, tensor in self._tensors.items() if name.startswith(start))

    def weight(self, name: str) -> mx.array:
        """Read a whole tensor, by its name in the checkpoint."""
        return read(self._tensors[name]).astype(mx.float32)

    def final_norm(self, hidden: mx.array) -> mx.array:
        """Normalise what came out of the last block, [..., hidden], as the head takes it."""
        return mx.fast.rms_norm(hidden, self.weight("model.norm.weight"), self.config.rms_norm_eps)

    @property
    def head(self) -> Tensor:
        """The head [V, hidden], unread; where they are tied it is the embedding."""
        return self._tensors[self.head_name]

    def head_pieces(self) -> Iterator[mx.array]:
        """Read the head's rows in order, [some, hidden] at a time."""
        rows, width = self.head.shape
        each = max(1, _ROWS_BYTES // (4 * width))
        for start in range(0, rows, each):
            yield self.head.rows(start, min(start + each, rows)).astype(mx.float32)

    @property
    def head_name(self) -> str:
        """The name of the head's weight in the checkpoint."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"


def split(hidden: mx.array) -> States:
    """Cut [N, L, hidden] into its sequences."""
    return [hidden[i : i + 1] for i in range(hidden.shape[0])]


def run(block: Callable[[mx.array, None], mx.array], states: States) -> States:
    """Send each sequence through `block`, one after another, so that a block's temporaries are small."""
    after = []
    for state in states:
        after.append(block(state, None))
        mx.eval(after[-1])
    return after


def layer_of(block: Block, name: str) -> nn.Linear:
    """One of the block's linear layers."""
    module, _, layer = name.partition(".")
    found: nn.Linear = getattr(getattr(block, module), layer)
    return found


@contextmanager
def replaced(block: Block, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some of the block's linear layers, by their names."""
    before = {name: layer_of(block, name) for name in layers}
    try:
        _put(block, layers)
        yield
    finally:
        _put(block, before)


def _put(block: Block, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        module, _, place = name.partition(".")
        setattr(getattr(block, module), place, layer)


def size_before_norm(outputs: mx.array, eps: float) -> mx.array:
    """What a norm divides outputs [..., n] by: [..., 1]."""
    return mx.sqrt(mx.square(outputs).mean(-1, keepdims=True) + eps)

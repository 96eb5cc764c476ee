"""Quantization calibrated on text, block after block, in memory for two blocks and the hidden states.

    calibration = Calibration(source, plan, tokens)
    tensors = calibration.embedding()
    for index in range(source.config.num_hidden_layers):
        tensors |= calibration.block(index)
    tensors |= calibration.head()

Each layer sees the inputs that the already quantized layers before it make of the text, and aims at
what the original makes of its own (half of the way: see Decisions in CONTRIBUTING). Where a
norm follows a layer, as Olmo 3's blocks have it after queries, keys, o_proj and down_proj, a token
counts by one over its output's mean square, because that is what the norm makes of an error.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from convert.calibration.fisher import embedding_hessian
from convert.calibration.gptq import quantized
from convert.calibration.solving import Metric
from convert.reading.layers import Layers, run, split
from convert.reading.source import Source
from convert.reading.stored import dequantized
from olmo3_mlx.model import Block
from olmo3_mlx.quantization import Quantization

_Through = Callable[[Block, mx.array], mx.array]  # a block's input -> one of its layers'

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_NORMED = ("q_proj", "k_proj", "o_proj", "down_proj")  # a norm over all of their outputs follows
_AIM = 0.5  # how much of earlier layers' errors a layer is to make good
_ROWS = 16384  # of embedding or head, quantized at once


@dataclass(frozen=True)
class Moments:
    """What a layer's inputs are like: the metric of the sum of x x^T, and drift [n, n], the sum of
    (original x - x) x^T, both over tokens, weighted, where x is the input in the quantized model; None if
    there is no drift.
    """

    metric: Metric
    drift: mx.array | None

    @classmethod
    def of(cls, pairs: Iterator[tuple[mx.array, mx.array]]) -> "Moments":
        """From pairs of quantized and original inputs, each [tokens, n]."""
        hessian = drift = mx.array(0.0)
        for here, there in pairs:
            hessian = hessian + here.T @ here
            mx.eval(hessian)  # by itself: each of them may have gigabytes
            drift = drift + (there - here).T @ here
            mx.eval(drift)
        left = [hessian]
        del hessian  # so that nothing holds it while it is factored
        return cls(Metric.of(left.pop()), drift)

    def aimed(self, weight: mx.array) -> tuple[mx.array, Metric]:
        """The weights [rows, n] whose outputs on the inputs here are nearer to the original outputs, and what
        errors of theirs cost.
        """
        if self.drift is not None:
            weight = weight + _AIM * self.metric.inverse(weight @ self.drift)
            mx.eval(weight)
        return weight, self.metric


class Calibration:
    """A model on its way through being quantized; the methods are called in the order shown above.

    `plan` says how layers are quantized, by their paths, all in mode affine; others are left as they are.
    `tokens` [N, L] are the text; scales, biases and what is not quantized are in `dtype`, by default the
    source's. Results are a function of the arguments alone.
    """

    def __init__(
        self,
        source: Source,
        plan: Mapping[str, Quantization],
        tokens: mx.array,
        dtype: mx.Dtype | None = None,
    ) -> None:
        self._source, self._plan, self._tokens, self._dtype = source, plan, tokens, dtype
        self._layers = Layers(source)
        self._original = split(self._layers.embed(tokens))
        self._hidden = self._original  # what the quantized model has instead

    def embedding(self) -> dict[str, mx.array]:
        """The embedding's tensors; an error in it counts by what the whole model makes of it."""
        how = self._plan.get(EMBEDDING)
        if how is None:
            self._hidden = [self._as_written(f"{EMBEDDING}.weight", state) for state in self._original]
            return {}
        metric = Metric.of(embedding_hessian(self._source, self._tokens))
        made = self._in_rows(EMBEDDING, how, Moments(metric, None))
        ids, places = np.unique(np.array(self._tokens), return_inverse=True)
        looked_up = {name: array[mx.array(ids)] for name, array in made.items()}
        rows = _dense(looked_up, EMBEDDING, how)
        hidden = rows[mx.array(places)].reshape(*self._tokens.shape, -1)
        mx.eval(hidden)
        self._hidden = split(hidden)
        return made

    def skip_embedding(self, there: Layers) -> None:
        """Go past an embedding that was made before and is `there`."""
        self._hidden = split(there.embed(self._tokens))

    def block(self, index: int) -> dict[str, mx.array]:
        """The tensors of block `index`'s quantized layers; blocks come in order."""
        original = self._layers.block(index)
        path = f"model.layers.{index}"
        weights = dict(tree_flatten(original.parameters()))
        block = self._begun(index, weights)
        made: dict[str, mx.array] = {}
        replaced: list[tuple[str, mx.array]] = []

        def make(names: tuple[str, ...], through: _Through) -> None:
            """Quantize layers that share an input: what `through` makes of the block's."""
            inputs = partial(self._inputs, original, block, through)
            shared = None
            for name in names:
                how, weight = self._plan.get(f"{path}.{name}"), weights[f"{name}.weight"]
                if how is None:
                    continue
                if name.endswith(_NORMED):
                    weight, metric = Moments.of(inputs(weight)).aimed(weight)
                else:
                    shared = shared or Moments.of(inputs(None))
                    weight, metric = shared.aimed(weight)
                tensors = self._made(f"{path}.{name}", weight, metric, how)
                made.update(tensors)
                replaced.append((f"{name}.weight", _dense(tensors, f"{path}.{name}", how)))
            block.load_weights(replaced, strict=False)

        make(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), lambda _, x: x)
        make(("self_attn.o_proj",), _attended)
        make(("mlp.gate_proj", "mlp.up_proj"), _between)
        make(("mlp.down_proj",), _activated)
        self._advance(original, block)
        return made

    def skip(self, index: int, block: Block) -> None:
        """Go past block `index`, made before: `block` is it, in float32 as it dequantizes."""
        self._advance(self._layers.block(index), block)

    def head(self) -> dict[str, mx.array]:
        """The head's tensors; none if it is the embedding."""
        how = self._plan.get(HEAD)
        if how is None or self._source.config.tie_word_embeddings:
            return {}
        eps, norm = self._source.config.rms_norm_eps, self._layers.weight("model.norm.weight")
        written = self._as_written("model.norm.weight", norm)
        moments = Moments.of(
            (_flat(mx.fast.rms_norm(here, written, eps)), _flat(mx.fast.rms_norm(there, norm, eps)))
            for here, there in zip(self._hidden, self._original, strict=True)
        )
        return self._in_rows(HEAD, how, moments)

    def _made(self, path: str, weight: mx.array, metric: Metric, how: Quantization) -> dict[str, mx.array]:
        """Tensors by name."""
        return quantized(weight, metric, how, self._dtype_of(f"{path}.weight")).tensors(path)

    def _begun(self, index: int, weights: Mapping[str, mx.array]) -> Block:
        """Block `index` with the original's weights, of which norms and layers that stay as they are, are as
        the result has them: a run that goes on reads them from there.
        """
        block, path = (
            Block(self._source.config, self._source.config.layer_types[index]),
            f"model.layers.{index}",
        )
        block.load_weights(
            [
                (name, weight if self._planned(path, name) else self._as_written(f"{path}.{name}", weight))
                for name, weight in weights.items()
            ]
        )
        return block

    def _planned(self, path: str, name: str) -> bool:
        return f"{path}.{name.removesuffix('.weight')}" in self._plan

    def _as_written(self, name: str, values: mx.array) -> mx.array:
        """Values of tensor `name`, which is not quantized, as they are read back from the result."""
        return values.astype(self._dtype_of(name)).astype(mx.float32)

    def _dtype_of(self, name: str) -> mx.Dtype:
        return self._dtype or self._source.tensors[name].dtype

    def _inputs(
        self,
        original: Block,
        block: Block,
        through: _Through,
        norm: mx.array | None,
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """A layer's inputs, one sequence at a time; `norm` is the weight whose output is normalised."""
        for x, y in zip(self._hidden, self._original, strict=True):
            here, there = _flat(through(block, x)), _flat(through(original, y))
            if norm is not None:
                output = there @ norm.T
                size = mx.sqrt(mx.square(output).mean(-1, keepdims=True) + self._source.config.rms_norm_eps)
                here, there = here / size, there / size
            yield here, there

    def _in_rows(self, path: str, how: Quantization, moments: Moments) -> dict[str, mx.array]:
        """Embedding or head, some rows at a time."""
        tensor = self._source.tensors[f"{path}.weight"]
        parts = []
        for start in range(0, tensor.shape[0], _ROWS):
            rows = tensor.rows(start, min(start + _ROWS, tensor.shape[0])).astype(mx.float32)
            parts.append(self._made(path, *moments.aimed(rows), how))
        return {name: mx.concatenate([made[name] for made in parts]) for name in parts[0]}

    def _advance(self, original: Block, block: Block) -> None:
        self._original, self._hidden = run(original, self._original), run(block, self._hidden)


def _dense(tensors: Mapping[str, mx.array], path: str, how: Quantization) -> mx.array:
    """The weights that a layer's tensors stand for, in float32."""
    parts = [
        tensors[f"{path}.{kind}"] for kind in ("weight", "scales", "biases") if f"{path}.{kind}" in tensors
    ]
    return dequantized(parts, how)


def _attended(block: Block, x: mx.array) -> mx.array:
    """What o_proj gets."""
    with _identity(block.self_attn, "o_proj"):
        out: mx.array = block.self_attn(x, None)
    return out


def _between(block: Block, x: mx.array) -> mx.array:
    """What the feed-forward gets."""
    out: mx.array = x + block.post_attention_layernorm(block.self_attn(x, None))
    return out


def _activated(block: Block, x: mx.array) -> mx.array:
    """What down_proj gets."""
    with _identity(block.mlp, "down_proj"):
        out: mx.array = block.mlp(_between(block, x))
    return out


@contextmanager
def _identity(module: nn.Module, name: str) -> Iterator[None]:
    """Let layer `name` of `module` give back its input."""
    layer = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, layer)


def _flat(x: mx.array) -> mx.array:
    """[..., n] -> [tokens, n]."""
    return x.reshape(-1, x.shape[-1])

"""Quantizing by calibration on a text, block after block, in memory for two blocks and the hidden states.

    calibration = Calibration(source, plan, tokens)
    tensors = calibration.embedding()
    for index in range(source.config.num_hidden_layers):
        tensors |= calibration.block(index)
    tensors |= calibration.head()

Each layer sees the inputs that the quantized layers before it give on the text, and aims at the outputs that
the original gives on its own (half of the way: see docs/decisions). Where a
norm follows a layer, as Olmo 3's blocks have it after queries, keys, o_proj and down_proj, a token
counts by one over its output's mean square, because that is the size of an error after the norm.
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
from convert.progress import untold
from convert.quantized import dequantized, part_names
from convert.reading.layers import Layers, run, split
from convert.reading.source import Source
from olmo3_mlx.model import Block
from olmo3_mlx.quantization import Quantization

_Through = Callable[[Block, mx.array], mx.array]  # a block and its input -> the input of one of its layers

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_NORMED = ("q_proj", "k_proj", "o_proj", "down_proj")  # a norm over all of their outputs follows
_AIM = 0.5  # how much of earlier layers' errors a layer is to make good
_ROWS = 16384  # of embedding or head, quantized at once


@dataclass(frozen=True)
class Moments:
    """Sums over a layer's inputs: the metric of the sum of x x^T, and `drift` [n, n], the sum of
    (original x - x) x^T, where x is the input in the quantized model; both are over weighted tokens. `drift`
    is None if inputs do not drift.
    """

    metric: Metric
    drift: mx.array | None

    @classmethod
    def of(cls, pairs: Iterator[tuple[mx.array, mx.array]]) -> "Moments":
        """Sum over pairs of quantized and original inputs, each [tokens, n]."""
        hessian = drift = mx.array(0.0)
        for given, original in pairs:
            hessian = hessian + given.T @ given
            mx.eval(hessian)  # by itself: each of them may have gigabytes
            drift = drift + (original - given).T @ given
            mx.eval(drift)
        summed = [hessian]
        del hessian  # so that nothing holds it while it is factored
        return cls(Metric.of(summed.pop()), drift)

    def aimed(self, weight: mx.array) -> tuple[mx.array, Metric]:
        """Move the weights [rows, n] so that their outputs on the quantized model's inputs are nearer to the
        original outputs. Gives them and the metric of their errors.
        """
        if self.drift is not None:
            weight = weight + _AIM * self.metric.inverse(weight @ self.drift)
            mx.eval(weight)
        return weight, self.metric


class Calibration:
    """A model while it is quantized; the methods are called in the order shown above.

    `plan` has the schemes of the layers to quantize, by their paths, all in mode affine; others stay as they
    are. `tokens` [N, L] are the text; scales, biases and what is not quantized are in `dtype`, by default
    the source's. Results are a function of the arguments alone. `each` is called with the name of a block's
    weight when that is quantized.
    """

    def __init__(
        self,
        source: Source,
        plan: Mapping[str, Quantization],
        tokens: mx.array,
        dtype: mx.Dtype | None = None,
        each: Callable[[str], None] = untold,
    ) -> None:
        self._source, self._plan, self._tokens, self._dtype = source, plan, tokens, dtype
        self._each = each
        self._layers = Layers(source)
        self._original = split(self._layers.embed(tokens))
        self._hidden = self._original  # the same states in the quantized model

    def embedding(self) -> dict[str, mx.array]:
        """Quantize the embedding into its tensors; an error in it counts by its effect at the model's end."""
        scheme = self._plan.get(EMBEDDING)
        if scheme is None:
            self._hidden = [self._as_written(f"{EMBEDDING}.weight", state) for state in self._original]
            return {}
        metric = Metric.of(embedding_hessian(self._source, self._tokens))
        tensors = self._in_rows(EMBEDDING, scheme, Moments(metric, None))
        ids, places = np.unique(np.array(self._tokens), return_inverse=True)
        looked_up = {name: array[mx.array(ids)] for name, array in tensors.items()}
        rows = _dense(looked_up, EMBEDDING, scheme)
        hidden = rows[mx.array(places)].reshape(*self._tokens.shape, -1)
        mx.eval(hidden)
        self._hidden = split(hidden)
        return tensors

    def skip_embedding(self, result: Layers) -> None:
        """Go past an embedding that was quantized before and is in `result`."""
        self._hidden = split(result.embed(self._tokens))

    def block(self, index: int) -> dict[str, mx.array]:
        """Quantize the layers of block `index` into their tensors; blocks come in order."""
        original = self._layers.block(index)
        path = f"model.layers.{index}"
        weights = dict(tree_flatten(original.parameters()))
        block = self._block_as_written(index, weights)
        tensors: dict[str, mx.array] = {}
        replaced: list[tuple[str, mx.array]] = []

        def quantize(names: tuple[str, ...], through: _Through) -> None:
            """Quantize layers that share an input, which `through` computes from the block's."""
            inputs = partial(self._inputs, original, block, through)
            shared = None
            for name in names:
                scheme, weight = self._plan.get(f"{path}.{name}"), weights[f"{name}.weight"]
                if scheme is None:
                    continue
                if name.endswith(_NORMED):
                    weight, metric = Moments.of(inputs(weight)).aimed(weight)
                else:
                    shared = shared or Moments.of(inputs(None))
                    weight, metric = shared.aimed(weight)
                parts = self._quantized(f"{path}.{name}", weight, metric, scheme)
                tensors.update(parts)
                replaced.append((f"{name}.weight", _dense(parts, f"{path}.{name}", scheme)))
                self._each(f"{path}.{name}.weight")
            block.load_weights(replaced, strict=False)

        quantize(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), lambda _, x: x)
        quantize(("self_attn.o_proj",), _attended)
        quantize(("mlp.gate_proj", "mlp.up_proj"), _between)
        quantize(("mlp.down_proj",), _activated)
        self._advance(original, block)
        return tensors

    def skip(self, index: int, block: Block) -> None:
        """Go past block `index`, which was quantized before and dequantizes to `block`, in float32."""
        self._advance(self._layers.block(index), block)

    def head(self) -> dict[str, mx.array]:
        """Quantize the head into its tensors; there are none if it is the embedding."""
        scheme = self._plan.get(HEAD)
        if scheme is None or self._source.config.tie_word_embeddings:
            return {}
        eps, norm = self._source.config.rms_norm_eps, self._layers.weight("model.norm.weight")
        written = self._as_written("model.norm.weight", norm)
        moments = Moments.of(
            (_flat(mx.fast.rms_norm(x, written, eps)), _flat(mx.fast.rms_norm(y, norm, eps)))
            for x, y in zip(self._hidden, self._original, strict=True)
        )
        return self._in_rows(HEAD, scheme, moments)

    def _quantized(
        self, path: str, weight: mx.array, metric: Metric, scheme: Quantization
    ) -> dict[str, mx.array]:
        """The tensors of the layer at `path`, by name, quantized under a metric."""
        return quantized(weight, metric, scheme, self._dtype_of(f"{path}.weight")).tensors(path)

    def _block_as_written(self, index: int, weights: Mapping[str, mx.array]) -> Block:
        """Block `index` with the original's weights; norms and layers that are not quantized are rounded as
        the result has them: a run that goes on reads them from there.
        """
        block, path = (
            Block(self._source.config, self._source.config.layer_types[index]),
            f"model.layers.{index}",
        )
        kept = {name for name in weights if f"{path}.{name.removesuffix('.weight')}" not in self._plan}
        written = {name: self._as_written(f"{path}.{name}", weights[name]) for name in kept}
        block.load_weights(list({**weights, **written}.items()))
        return block

    def _as_written(self, name: str, values: mx.array) -> mx.array:
        """Round the values of tensor `name`, which is not quantized, to those that the result has."""
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
        """A layer's quantized and original inputs, one sequence at a time; `norm` is the layer's weight if
        its outputs are normalised.
        """
        for x, y in zip(self._hidden, self._original, strict=True):
            given, wanted = _flat(through(block, x)), _flat(through(original, y))
            if norm is not None:
                output = wanted @ norm.T
                size = mx.sqrt(mx.square(output).mean(-1, keepdims=True) + self._source.config.rms_norm_eps)
                given, wanted = given / size, wanted / size
            yield given, wanted

    def _in_rows(self, path: str, scheme: Quantization, moments: Moments) -> dict[str, mx.array]:
        """Quantize embedding or head, some rows at a time."""
        tensor = self._source.tensors[f"{path}.weight"]
        parts = []
        for start in range(0, tensor.shape[0], _ROWS):
            rows = tensor.rows(start, min(start + _ROWS, tensor.shape[0])).astype(mx.float32)
            parts.append(self._quantized(path, *moments.aimed(rows), scheme))
        return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _advance(self, original: Block, block: Block) -> None:
        self._original, self._hidden = run(original, self._original), run(block, self._hidden)


def _dense(tensors: Mapping[str, mx.array], path: str, scheme: Quantization) -> mx.array:
    """The weights that the tensors of the affine layer at `path` stand for, in float32."""
    return dequantized([tensors[name] for name in part_names(f"{path}.weight")], scheme)


def _attended(block: Block, x: mx.array) -> mx.array:
    """The input of o_proj, from that of the block."""
    with _without(block.self_attn, "o_proj"):
        out: mx.array = block.self_attn(x, None)
    return out


def _between(block: Block, x: mx.array) -> mx.array:
    """The input of the feed-forward, from that of the block."""
    out: mx.array = x + block.post_attention_layernorm(block.self_attn(x, None))
    return out


def _activated(block: Block, x: mx.array) -> mx.array:
    """The input of down_proj, from that of the block."""
    with _without(block.mlp, "down_proj"):
        out: mx.array = block.mlp(_between(block, x))
    return out


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Take layer `name` out of `module`: it gives back its input."""
    layer = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, layer)


def _flat(x: mx.array) -> mx.array:
    """Reshape [..., n] to [tokens, n]."""
    return x.reshape(-1, x.shape[-1])

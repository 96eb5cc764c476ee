"""Quantizing by calibration on a text, block after block, in memory for two blocks and the hidden states.

    calibration = Calibration(source, plan, tokens)
    tensors = calibration.embedding()
    for index in range(source.config.num_hidden_layers):
        tensors |= calibration.block(index)
    tensors |= calibration.head()

Each layer sees the inputs that the quantized layers before it give on the text, and aims at the outputs
that the original gives on its own (half of the way: see docs/decisions). At o_proj and down_proj, which a
norm follows, a token counts by one over its output's mean square, because that is the size of an error after
the norm.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from convert.calibration.fisher import embedding_hessian
from convert.calibration.gptq import quantized
from convert.calibration.metric import Metric
from convert.calibration.moments import Moments, Pairs
from convert.calibration.sides import Side, Sides, flat
from convert.progress import untold
from convert.quantized import dequantized, part_names
from convert.reading.layers import Layers, run, split
from convert.reading.source import Source
from olmo3_mlx.model import Block
from olmo3_mlx.quantization import Quantization

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_FROM_BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # they take what the block takes
_ROWS_BYTES = 2**28  # of weights in float32, quantized at once


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
        self._hidden = list(self._original)  # the same states in the quantized model

    def embedding(self) -> dict[str, mx.array]:
        """Quantize the embedding into its tensors; an error in it counts by its effect at the model's end."""
        if EMBEDDING not in self._plan:
            self._hidden = [self._as_written(f"{EMBEDDING}.weight", state) for state in self._original]
            return {}
        moments = Moments(Metric.of(embedding_hessian(self._source, self._tokens)))
        tensors = self._quantized([EMBEDDING], moments)
        ids, places = np.unique(np.array(self._tokens), return_inverse=True)
        looked_up = {name: array[mx.array(ids)] for name, array in tensors.items()}
        rows = _dense(looked_up, EMBEDDING, self._plan[EMBEDDING])
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
        sides = Sides(
            Side(original, self._original), Side(self._block_as_written(index, original), self._hidden)
        )
        tensors = self._step(index, sides, _FROM_BLOCK, sides.states)
        sides.attend()
        tensors |= self._step(index, sides, ("self_attn.o_proj",), sides.attended)
        sides.add_attention()
        tensors |= self._step(index, sides, ("mlp.gate_proj", "mlp.up_proj"), sides.states)
        tensors |= self._step(index, sides, ("mlp.down_proj",), sides.activated, few_rows=True)
        sides.add_feed_forward()
        return tensors

    def _step(
        self,
        index: int,
        sides: Sides,
        names: Sequence[str],
        inputs: Callable[[], Pairs],
        *,
        few_rows: bool = False,
    ) -> dict[str, mx.array]:
        """Quantize layers of block `index` that share `inputs`, and put them into its written side. Where
        they have `few_rows`, less is kept of how inputs drift.
        """
        named = {name: f"model.layers.{index}.{name}" for name in names}
        planned = {name: path for name, path in named.items() if path in self._plan}
        if not planned:
            return {}
        paths = list(planned.values())
        weights = {path: self._layers.weight(f"{path}.weight") for path in paths} if few_rows else None
        tensors = self._quantized(paths, Moments.of(inputs(), weights))
        sides.written.load({name: _dense(tensors, path, self._plan[path]) for name, path in planned.items()})
        for path in paths:
            self._each(f"{path}.weight")
        return tensors

    def skip(self, index: int, block: Block) -> None:
        """Go past block `index`, which was quantized before and dequantizes to `block`, in float32."""
        self._original = run(self._layers.block(index), self._original)
        self._hidden = run(block, self._hidden)

    def head(self) -> dict[str, mx.array]:
        """Quantize the head into its tensors; there are none if it is the embedding."""
        if HEAD not in self._plan or self._source.config.tie_word_embeddings:
            return {}
        eps, norm = self._source.config.rms_norm_eps, self._layers.weight("model.norm.weight")
        written = self._as_written("model.norm.weight", norm)
        moments = Moments.of(
            (flat(mx.fast.rms_norm(x, written, eps)), flat(mx.fast.rms_norm(y, norm, eps)))
            for x, y in zip(self._hidden, self._original, strict=True)
        )
        return self._quantized([HEAD], moments)

    def _quantized(self, paths: Sequence[str], moments: Moments) -> dict[str, mx.array]:
        """Quantize layers with the same inputs into their tensors, by name, some rows at once."""
        parts: dict[str, list[mx.array]] = {}
        for batch in self._batches(paths):
            weights = [
                moments.aimed(
                    path,
                    rows,
                    self._source.tensors[f"{path}.weight"].rows(rows.start, rows.stop).astype(mx.float32),
                )
                for path, rows in batch
            ]
            matrices = quantized(
                weights,
                moments.metric,
                [self._plan[path] for path, _ in batch],
                [self._dtype_of(f"{path}.weight") for path, _ in batch],
            )
            for (path, _), matrix in zip(batch, matrices, strict=True):
                for name, array in matrix.tensors(path).items():
                    mx.eval(array)
                    parts.setdefault(name, []).append(array)
        return {name: mx.concatenate(arrays) for name, arrays in parts.items()}

    def _batches(self, paths: Sequence[str]) -> list[list[tuple[str, slice]]]:
        """Rows of the layers at these paths, in their order, that are quantized at once."""
        batches: list[list[tuple[str, slice]]] = [[]]
        room = 0
        for path in paths:
            rows, width = self._source.tensors[f"{path}.weight"].shape
            each = max(1, _ROWS_BYTES // (4 * width))
            start = 0
            while start < rows:
                if room == 0:
                    batches, room = [*batches, []], each
                stop = min(rows, start + room)
                batches[-1].append((path, slice(start, stop)))
                room -= stop - start
                start = stop
        return [batch for batch in batches if batch]

    def _block_as_written(self, index: int, original: Block) -> Block:
        """Block `index` with the original's weights; norms and layers that are not quantized are rounded as
        the result has them: a run that goes on reads them from there.
        """
        config, path = self._source.config, f"model.layers.{index}"
        block = Block(config, config.layer_types[index])
        weights = dict(tree_flatten(original.parameters()))
        kept = {name for name in weights if f"{path}.{name.removesuffix('.weight')}" not in self._plan}
        written = {name: self._as_written(f"{path}.{name}", weights[name]) for name in kept}
        block.load_weights(list({**weights, **written}.items()))
        return block

    def _as_written(self, name: str, values: mx.array) -> mx.array:
        """Round the values of tensor `name`, which is not quantized, to those that the result has."""
        return values.astype(self._dtype_of(name)).astype(mx.float32)

    def _dtype_of(self, name: str) -> mx.Dtype:
        return self._dtype or self._source.tensors[name].dtype


def _dense(tensors: Mapping[str, mx.array], path: str, scheme: Quantization) -> mx.array:
    """The weights that the tensors of the affine layer at `path` stand for, in float32."""
    return dequantized([tensors[name] for name in part_names(f"{path}.weight")], scheme)

"""Quantizing by calibration on texts, block after block, in memory for some layers and the hidden states.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest

import mlx.core as mx
import numpy as np

from convert.calibration.fisher import Fisher
from convert.calibration.gptq import quantized
from convert.calibration.matrix import QuantizedMatrix
from convert.calibration.memory import ROWS_BYTES
from convert.calibration.metric import Metric
from convert.calibration.moments import Moments, Pairs
from convert.calibration.outputs import Outputs
from convert.calibration.sides import Read, Side, Sides, flat
from convert.progress import untold
from convert.quantized import dequantized, part_names
from convert.reading.layers import ATTENDING, DOWN, GATE, OUT, UP, Layers, split
from convert.reading.source import Source
from olmo3_mlx.quantization import Quantization

_Rows = tuple[str, slice]  # some rows of the layer at a path

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# Layers whose outputs' errors are weighed against each other; with the feed-forward's wide outputs that takes
# many times as much and gains nothing.
_WEIGHED = (*ATTENDING, OUT, DOWN)


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
        self._layers, self._fisher = Layers(source), Fisher(source, tokens)
        self._original = split(self._layers.embed(tokens))
        self._hidden = list(self._original)  # the same states in the quantized model
        self._costs: dict[str, mx.array] = {}  # of errors in outputs, of layers that come next in a block

    def embedding(self) -> dict[str, mx.array]:
        """Quantize the embedding into its tensors; an error in it counts by its effect at the model's end."""
        if EMBEDDING not in self._plan:
            self._hidden = [self._as_written(f"{EMBEDDING}.weight", state) for state in self._original]
            return {}
        tensors = self._quantized([EMBEDDING], Moments(Metric.of(self._fisher.embedding())))
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
        tensors: dict[str, mx.array] = {}
        path = f"model.layers.{index}"
        weighed = tuple(name for name in _WEIGHED if f"{path}.{name}" in self._plan)
        self._costs = self._fisher.outputs(index, self._original, weighed) if weighed else {}
        sides = self._sides(index, partial(self._written, index, tensors))
        step = partial(self._step, index, tensors)
        step(ATTENDING, sides.states)
        sides.attend()
        step((OUT,), sides.attended)
        sides.add_attention()
        step((GATE, UP), sides.states)
        step((DOWN,), sides.activated, narrow=True)
        sides.add_feed_forward()
        return tensors

    def skip(self, index: int, result: Layers) -> None:
        """Go past block `index`, which was quantized before and is in `result`."""
        sides = self._sides(index, lambda name: result.weight(f"model.layers.{index}.{name}"))
        sides.attend()
        sides.add_attention()
        sides.add_feed_forward()

    def _sides(self, index: int, written: Read) -> Sides:
        """Block `index` of both models; `written` reads the weights of the quantized one."""
        config = self._source.config
        original = Side(
            config, index, lambda name: self._layers.weight(f"model.layers.{index}.{name}"), self._original
        )
        return Sides(original, Side(config, index, written, self._hidden), config.rms_norm_eps)

    def _written(self, index: int, tensors: Mapping[str, mx.array], name: str) -> mx.array:
        """The weight `name` of block `index` as the result has it: from `tensors` if it is quantized; if not,
        rounded as there: a run that goes on reads it from there.
        """
        path = f"model.layers.{index}.{name.removesuffix('.weight')}"
        if path in self._plan:
            return _dense(tensors, path, self._plan[path])
        return self._as_written(f"{path}.weight", self._layers.weight(f"{path}.weight"))

    def _step(
        self,
        index: int,
        tensors: dict[str, mx.array],
        names: Sequence[str],
        inputs: Callable[[], Pairs],
        *,
        narrow: bool = False,
    ) -> None:
        """Quantize layers of block `index` that share `inputs` into their tensors. If they are `narrow`, with
        fewer outputs than inputs, less is kept of how inputs drift.
        """
        paths = {path: name for name in names if (path := f"model.layers.{index}.{name}") in self._plan}
        if not paths:
            return
        outputs = {path: Outputs(self._costs.pop(name)) for path, name in paths.items() if name in _WEIGHED}
        weights = {path: self._layers.weight(f"{path}.weight") for path in paths} if narrow else None
        moments = [Moments.of(inputs(), weights)]
        del weights
        quantize = partial(self._weighed, outputs) if outputs else partial(self._quantized, list(paths))
        tensors.update(quantize(moments.pop()))
        for path in paths:
            self._each(f"{path}.weight")

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
        tensors = _Parts()
        for batch in self._batches(paths):
            weights = [self._aimed(path, rows, moments) for path, rows in batch]
            for (path, rows), matrix in self._rounded(batch, weights, moments.metric):
                tensors.add(path, rows, matrix)
        return tensors.joined()

    def _weighed(self, outputs: Mapping[str, Outputs], moments: Moments) -> dict[str, mx.array]:
        """The same for layers, by path, whose `outputs` are known: errors in some are made good by others."""
        tensors = _Parts()
        whole = {path: slice(0, self._source.tensors[f"{path}.weight"].shape[0]) for path in outputs}
        aimed = {path: self._aimed(path, rows, moments) for path, rows in whole.items()}
        metric = moments.metric
        del moments  # what inputs drift by has been used
        for parts in zip_longest(*(each.parts for each in outputs.values())):
            batch = [(path, rows) for path, rows in zip(outputs, parts, strict=True) if rows is not None]
            targets = [outputs[path].target(aimed[path][rows]) for path, rows in batch]
            for (path, rows), matrix in self._rounded(batch, targets, metric):
                outputs[path].add(aimed[path][rows] - matrix.dense())
                tensors.add(path, rows, matrix)
        return tensors.joined()

    def _aimed(self, path: str, rows: slice, moments: Moments) -> mx.array:
        weight = self._source.tensors[f"{path}.weight"].rows(rows.start, rows.stop)
        return moments.aimed(path, rows, weight.astype(mx.float32))

    def _rounded(
        self, batch: Sequence[_Rows], weights: Sequence[mx.array], metric: Metric
    ) -> Iterator[tuple[_Rows, QuantizedMatrix]]:
        schemes = [self._plan[path] for path, _ in batch]
        dtypes = [self._dtype_of(f"{path}.weight") for path, _ in batch]
        return zip(batch, quantized(weights, metric, schemes, dtypes), strict=True)

    def _batches(self, paths: Sequence[str]) -> list[list[_Rows]]:
        """Rows of the layers at these paths, in their order, that are quantized at once."""
        batches: list[list[_Rows]] = [[]]
        room = 0
        for path in paths:
            rows, width = self._source.tensors[f"{path}.weight"].shape
            each = max(1, ROWS_BYTES // (4 * width))
            start = 0
            while start < rows:
                if room == 0:
                    batches, room = [*batches, []], each
                stop = min(rows, start + room)
                batches[-1].append((path, slice(start, stop)))
                room -= stop - start
                start = stop
        return [batch for batch in batches if batch]

    def _as_written(self, name: str, values: mx.array) -> mx.array:
        """Round the values of tensor `name`, which is not quantized, to those that the result has."""
        return values.astype(self._dtype_of(name)).astype(mx.float32)

    def _dtype_of(self, name: str) -> mx.Dtype:
        return self._dtype or self._source.tensors[name].dtype


class _Parts:
    """The tensors of layers whose rows are quantized in some order."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, mx.array]] = {}

    def add(self, path: str, rows: slice, matrix: QuantizedMatrix) -> None:
        """Add some rows of the layer at `path`."""
        for name, array in matrix.tensors(path).items():
            mx.eval(array)
            self._parts.setdefault(name, {})[rows.start] = array

    def joined(self) -> dict[str, mx.array]:
        """The whole tensors, by name."""
        return {name: mx.concatenate([at[row] for row in sorted(at)]) for name, at in self._parts.items()}


def _dense(tensors: Mapping[str, mx.array], path: str, scheme: Quantization) -> mx.array:
    """The weights that the tensors of the affine layer at `path` stand for, in float32."""
    return dequantized([tensors[name] for name in part_names(f"{path}.weight")], scheme)

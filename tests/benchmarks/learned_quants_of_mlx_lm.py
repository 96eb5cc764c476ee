"""mlx-lm's own ways of quantizing that learn from a text, for benchmarks to measure beside ours.

All at mlx-lm's defaults, except: the text comes from the network there, here it is the one that comes with
this package, all of it; models compute in float32 while they are calibrated, as bfloat16 is many times as
slow on a CPU, and the result is rounded to bfloat16; dwq multiplies with unpacked weights, for speed. What
dynamic_quant is asked for beyond its defaults (other bits, other sizes) its command takes as options. awq
does not know Olmo 3.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.quant import dwq, dynamic_quant, gptq
from mlx_lm.utils import load_model, quantize_model

from convert.texts.shipped import calibration_texts
from olmo3_mlx import Tokenizer
from olmo3_mlx.quantization import Quantization

SEED = 123  # mlx-lm's
_SAMPLE = 512  # tokens, for all but dwq
_DWQ_SAMPLES, _DWQ_VALIDATED, _DWQ_SAMPLE, _DWQ_BATCH, _DWQ_RATE = 2048, 32, 1025, 4, 1e-6


class Learned(NamedTuple):
    """Quantized tensors by name, and how many tokens they were calibrated on."""

    tensors: dict[str, mx.array]
    tokens: int


def with_gptq(folder: Path) -> Learned:
    mx.random.seed(SEED)
    model, _ = _in_float32(folder)
    data = _samples(folder)
    model, _ = gptq.gptq_quantize(model, data, 4, 64, fallback_bits=6, fallback_group_size=64)
    return Learned(_tensors_of(model), data.size)


def with_dynamic_quant(folder: Path, low: int, high: int, sizes: Sequence[float]) -> Iterator[Learned]:
    """The result at each of some sizes, in bits per weight. Sensitivities, which do not depend on the size,
    are found once, in float32; the rest is done to the bfloat16 checkpoint.
    """
    mx.random.seed(SEED)
    model, _ = _in_float32(folder)
    data = _samples(folder)
    sensitivities = dict(dynamic_quant.estimate_sensitivities(model, data, low, 64, high, 64))
    for size in sizes:
        model, config = load_model(folder)
        threshold = dynamic_quant.estimate_threshold(
            model,
            sensitivities,
            target_bpw=size,
            low_bits=low,
            low_group_size=64,
            high_bits=high,
            high_group_size=64,
        )

        def chosen(path: str, layer: nn.Module, threshold: float = threshold) -> bool | dict[str, int]:
            if not hasattr(layer, "to_quantized"):
                return False
            return {"bits": high, "group_size": 64} if sensitivities[path] > threshold else True

        model, _ = quantize_model(model, config, group_size=64, bits=low, quant_predicate=chosen)
        yield Learned(_tensors_of(model), data.size)


def with_dwq(folder: Path) -> Learned:
    """Samples are pieces of the text from random places."""

    def unpacked(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
        parts = (layer.weight, layer.scales, layer.biases)
        return x @ mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits).T

    setattr(nn.QuantizedLinear, "__call__", unpacked)  # noqa: B010  (mypy takes it for a mistake)
    mx.random.seed(SEED)
    np.random.seed(SEED)
    model, config = _in_float32(folder)
    student, _ = load_model(folder)
    student, _ = quantize_model(student, copy.deepcopy(config), 64, 4)
    student.set_dtype(mx.float32)
    ids = _text(folder)
    starts = np.random.randint(0, len(ids) - _DWQ_SAMPLE, _DWQ_SAMPLES + _DWQ_VALIDATED)
    data = [(ids[start : start + _DWQ_SAMPLE], 0) for start in starts]
    dwq.dwq_quantize(
        student,
        lambda batch, index, split: model(batch),
        optimizers.Adam(learning_rate=_DWQ_RATE, bias_correction=True),
        data[:_DWQ_SAMPLES],
        data[_DWQ_SAMPLES:],
        batch_size=_DWQ_BATCH,
        max_seq_length=_DWQ_SAMPLE,
        seed=SEED,
        dtype=mx.float32,
    )
    return Learned(_tensors_of(student), _DWQ_SAMPLES * _DWQ_SAMPLE)


def dense(quantized: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """All weights, in float32, that the tensors of a result stand for; `shapes` are the original's."""
    plan = _plan(quantized, shapes)
    kept = {n: a.astype(mx.float32) for n, a in quantized.items() if n.rpartition(".")[0] not in plan}
    weights = {
        f"{path}.weight": mx.dequantize(
            quantized[f"{path}.weight"],
            quantized[f"{path}.scales"].astype(mx.float32),
            quantized[f"{path}.biases"].astype(mx.float32),
            group_size=scheme.group_size,
            bits=scheme.bits,
        )
        for path, scheme in plan.items()
    }
    return kept | weights


def _plan(
    quantized: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Quantization]:
    """Bits and groups as the shapes say."""
    plan = {}
    for path in (name.removesuffix(".scales") for name in quantized if name.endswith(".scales")):
        columns = shapes[f"{path}.weight"][1]
        bits = quantized[f"{path}.weight"].shape[1] * 32 // columns
        plan[path] = Quantization(bits, columns // quantized[f"{path}.scales"].shape[1])
    return plan


def _in_float32(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, config = load_model(folder)
    model.set_dtype(mx.float32)
    return model, config


def _tensors_of(model: nn.Module) -> dict[str, mx.array]:
    model.set_dtype(mx.bfloat16)
    tensors = dict(tree_flatten(model.parameters()))
    mx.eval(tensors)
    return tensors


def _text(folder: Path) -> list[int]:
    tokenizer = Tokenizer.from_folder(folder)
    texts = [text.tokenized(tokenizer) for text in calibration_texts(tokenizer)]
    return list(chain.from_iterable(chain.from_iterable(text.documents for text in texts)))


def _samples(folder: Path) -> mx.array:
    """The text as samples [N, L] in a random order, as mlx_lm.quant.utils.load_data cuts its own."""
    ids = mx.array(_text(folder))
    rows = ids[: ids.size // _SAMPLE * _SAMPLE].reshape(-1, _SAMPLE)
    return rows[mx.random.permutation(rows.shape[0])]

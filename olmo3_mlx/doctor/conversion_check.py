"""A small random checkpoint converted to 8 bits and loaded again, against its original.

The conversion is a value: this room knows nothing of the package `convert`, which is built on the library.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.doctor import exact
from olmo3_mlx.doctor.finding import Outcome, judged
from olmo3_mlx.doctor.golden import relative_errors, worst
from olmo3_mlx.model import Olmo3

Conversion = Callable[[Path, Path], object]  # a checkpoint's folder, and a new one, in 8 bits of groups of 64

ADVICE = "checkpoints converted on this machine cannot be trusted: report it with all of this"

# MLX moves the scale so that one end of a group is exact, which may cut up to a step off the other end.
_STEPS = 1.05
_LOGITS = 0.15  # of a logit's standard deviation; measured 0.036, as random weights forgive little

_CONFIG: dict[str, Any] = {
    "model_type": "olmo3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}


def conversion(convert: Conversion) -> Outcome:
    """That each weight comes back within half a step, all else as it was, and the logits near."""
    original = _random_model()
    with tempfile.TemporaryDirectory(prefix="olmo3-doctor-") as folder:
        source, dest = Path(folder, "original"), Path(folder, "converted")
        source.mkdir()
        (source / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        mx.save_safetensors(str(source / "model.safetensors"), original.tensors(), metadata={"format": "pt"})
        convert(source, dest)
        converted = Checkpoint.in_folder(dest).load("float32")
        steps = _steps(original, converted)
        tokens = mx.array([[37 * i % 256 for i in range(24)]])
        error = worst(relative_errors(converted(tokens)[0], original(tokens)[0]))
    said = f"weights off by {steps:.2f} of at most {_STEPS} steps, logits by {error:.1e} of at most {_LOGITS}"
    return judged(steps <= _STEPS and error <= _LOGITS, said)


def _random_model() -> Olmo3:
    model = Olmo3(Olmo3Config.from_dict(_CONFIG))
    key, weights = mx.random.key(0), {}
    for name, array in model.tensors().items():
        key, draw = mx.random.split(key)
        normal = mx.random.normal(array.shape, key=draw)
        weights[name] = 1 + 0.1 * normal if "norm" in name else normal * array.shape[-1] ** -0.5
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def _steps(original: Olmo3, converted: Olmo3) -> float:
    """The largest difference of a weight, in steps of its scale; infinite where what is not quantized has
    changed.
    """
    found, largest = converted.tensors(), 0.0
    for name, array in original.tensors().items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in found:
            same = bool(mx.array_equal(found[name], array).item())
            largest = largest if same else float("inf")
            continue
        scales = found[f"{path}.scales"]
        weights = exact.dequantized(found[name], scales, found[f"{path}.biases"], 8)
        with mx.stream(mx.cpu):
            unit = mx.repeat(mx.abs(scales).astype(mx.float64), array.shape[-1] // scales.shape[-1], axis=-1)
        largest = max(largest, exact.error(array, weights, unit))
    return largest

"""Checkpoints to models, strictly: every tensor there, none besides, each of its shape, all finite.

Reads what Hugging Face and MLX write: config.json, one or more safetensors files, plain or
quantized. Tensors bear the names of the model's modules, so nothing is renamed.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from olmo3_mlx.checkpoints.hub import resolve, weight_files
from olmo3_mlx.config import GenerationConfig, Olmo3Config
from olmo3_mlx.errors import CheckpointError, OptionError
from olmo3_mlx.fields import read_json
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import NAN_SCALES, QuantizationConfig
from olmo3_mlx.text.tokenizer import Tokenizer

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

_NAMED_AT_MOST = 20  # tensors in one error message


class Shaped(Protocol):
    """An array, or a tensor in a file that will become one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        ...

    @property
    def dtype(self) -> mx.Dtype:
        """Its type."""
        ...


def load(
    model: str | Path, *, revision: str | None = None, dtype: str | mx.Dtype | None = None
) -> tuple[Olmo3, Tokenizer]:
    """Load a model and its tokenizer.

    `model` is "demo", a checkpoint's folder, or a hub id, then at `revision` (branch, tag, commit).
    `dtype` ("bfloat16", "float16", "float32") is what the model computes in; left out, it is the
    checkpoint's, except on MLX's CPU backend (see `default_dtype`).

    Raises ConfigError, CheckpointError, HubError, TokenizerError or TemplateError, each with one
    line that says what is wrong with which file.
    """
    target = dtype_named(dtype) if dtype is not None else None
    folder = resolve(model, revision)
    config, generation_config = load_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return _build(folder, config, generation_config, target), tokenizer


def _build(
    folder: Path, config: Olmo3Config, generation_config: GenerationConfig, dtype: mx.Dtype | None
) -> Olmo3:
    """The model in a checkpoint's folder, checked and evaluated."""
    weights = read_weights(folder)
    model = Olmo3(config, generation_config)
    quantize(model, weights, folder)
    check_names_and_shapes(model, weights, folder)
    dtype = dtype or default_dtype(weights)
    if dtype is not None:
        weights = {
            name: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w for name, w in weights.items()
        }
    check_finite(weights, folder, config.quantization)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def load_config(folder: Path) -> tuple[Olmo3Config, GenerationConfig]:
    """The architecture and generation defaults in a folder, without its weights."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: expected a checkpoint's folder, found no config.json in it")
    config = Olmo3Config.from_file(folder / "config.json")
    path = folder / "generation_config.json"
    data = read_json(path) if path.is_file() else {}
    return config, GenerationConfig.from_dict(data, eos_token_ids=config.eos_token_ids, where=str(path))


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors by name, lazily: shapes and dtypes are known, data is read when evaluated.

    Raises CheckpointError for a file that is missing or damaged, or a tensor that comes twice.
    """
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        try:
            tensors = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: damaged or cut short, fetch it again ({error})") from None
        assert isinstance(tensors, dict)
        twice = sorted(tensors.keys() & weights.keys())
        if twice:
            raise CheckpointError(f"{file}: holds tensors that another file holds too: {name_some(twice)}")
        weights.update(tensors)
    return weights


def default_dtype(weights: dict[str, mx.array]) -> mx.Dtype | None:
    """What to compute in unless told: None for the checkpoint's own dtype.

    MLX's CPU backend multiplies 4-bit weights 8 to 11 times faster with float32 activations than
    with bfloat16 ones, and float16 weights slower than float32 ones; there both become float32.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    dtypes = {w.dtype for w in weights.values()}
    return mx.float32 if mx.uint32 in dtypes or mx.float16 in dtypes else None


def check_finite(
    weights: dict[str, mx.array], folder: Path, quantization: QuantizationConfig | None = None
) -> None:
    """Raise CheckpointError that names the tensors with NaN or infinite values."""
    bad = [name for name, w in weights.items() if not mx.all(_finite(name, w, quantization)).item()]
    if bad:
        raise CheckpointError(
            f"{folder}: NaN or infinite values in {name_some(bad)}: fetch it again, or, if a cast made "
            f"them, choose a wider dtype"
        )


def _finite(name: str, weight: mx.array, quantization: QuantizationConfig | None) -> mx.array:
    if mx.issubdtype(weight.dtype, mx.floating):
        # One reduction tells that all are finite, three times faster than asking each; it cannot tell
        # that one is not, as a sum may overflow.
        return mx.array(True) if mx.isfinite(weight.sum()).item() else mx.isfinite(weight)
    how = quantization.of(name.removesuffix(".scales")) if quantization else None
    finite = mx.array(True)
    for code in NAN_SCALES.get(how.mode, ()) if how and name.endswith(".scales") else ():
        finite = finite & (weight != code)
    return finite


def quantize(model: Olmo3, weights: Collection[str], folder: Path) -> None:
    """Make those layers quantized for which the checkpoint has scales, as config.json says.

    Raises CheckpointError if the two do not fit.
    """
    quantization = model.config.quantization
    if quantization is None:
        if any(name.endswith(".scales") for name in weights):
            raise CheckpointError(
                f"{folder}: the weights are quantized, but config.json has no quantization: take the "
                f"config.json that belongs to them"
            )
        return
    if not any(name.endswith(".scales") for name in weights):
        raise CheckpointError(
            f"{folder}: config.json says that the weights are quantized, but none are: take the "
            f"config.json that belongs to them"
        )

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        how = quantization.of(path)
        if how is None or f"{path}.scales" not in weights:
            return False
        if not isinstance(module, nn.Linear | nn.Embedding):
            return False
        if module.weight.shape[-1] % how.group_size:
            raise CheckpointError(
                f"{folder}: config.json says group_size {how.group_size} for {path}, which does not "
                f"divide its {module.weight.shape[-1]} inputs"
            )
        return {"bits": how.bits, "group_size": how.group_size, "mode": how.mode}

    nn.quantize(model, class_predicate=predicate)


def check_names_and_shapes(model: Olmo3, weights: Mapping[str, Shaped], folder: Path) -> None:
    """Raise CheckpointError that names each tensor missing, unexpected, misshapen or of wrong type."""
    expected = model.tensors()
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    faults = [f"lacks {name_some(missing)}"] if missing else []
    if unexpected:
        faults.append(f"has tensors that its config does not call for: {name_some(unexpected)}")
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults)}")
    wrong = []
    for name, array in expected.items():
        found = weights[name]
        both_floating = all(mx.issubdtype(a.dtype, mx.floating) for a in (array, found))
        if found.shape != array.shape:
            wrong.append(f"{name} must have shape {list(array.shape)}, not {list(found.shape)}")
        elif found.dtype != array.dtype and not both_floating:
            wrong.append(f"{name} must be {array.dtype}, not {found.dtype}")
    if wrong:
        raise CheckpointError(f"{folder}: {name_some(wrong)}")


def dtype_named(dtype: str | mx.Dtype) -> mx.Dtype:
    """The MLX dtype of that name. Raises OptionError unless it is one of DTYPES."""
    if isinstance(dtype, mx.Dtype):
        dtype = str(dtype).rpartition(".")[2]
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def name_some(names: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")

"""Weights of a checkpoint, strictly: every tensor there, none besides, each of its shape, all finite."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from olmo3_mlx.checkpoints.headers import is_buffer, name_some
from olmo3_mlx.errors import CheckpointError, OptionError
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import NAN_SCALES, QuantizationConfig

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


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


def read_weights(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors by name, lazily: data is read when it is evaluated. Their headers were read before, and are
    right (see headers.py). Raises CheckpointError for a file that is damaged.
    """
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            tensors = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file}: damaged or cut short, fetch it again ({error})") from None
        assert isinstance(tensors, dict)
        weights |= {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}
    return weights


def default_dtype(weights: Mapping[str, Shaped]) -> mx.Dtype | None:
    """What to compute in unless told: None for the checkpoint's own dtype.

    MLX's CPU backend multiplies 4-bit weights 8 to 11 times faster with float32 activations than
    with bfloat16 ones, and float16 weights slower than float32 ones; there both become float32.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return None
    dtypes = {w.dtype for w in weights.values()}
    return mx.float32 if mx.uint32 in dtypes or mx.float16 in dtypes else None


def check_finite(
    weights: Mapping[str, mx.array], folder: Path, quantization: QuantizationConfig | None = None
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
    layer = quantization.of(name.removesuffix(".scales")) if quantization else None
    finite = mx.array(True)
    for code in NAN_SCALES.get(layer.mode, ()) if layer and name.endswith(".scales") else ():
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
        layer = quantization.of(path)
        if layer is None or f"{path}.scales" not in weights:
            return False
        if not isinstance(module, nn.Linear | nn.Embedding):
            return False
        if module.weight.shape[-1] % layer.group_size:
            raise CheckpointError(
                f"{folder}: config.json says group_size {layer.group_size} for {path}, which does not "
                f"divide its {module.weight.shape[-1]} inputs"
            )
        return {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}

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

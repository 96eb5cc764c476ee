"""What the shapes of a checkpoint's tensors say about its quantization, where config.json does not say it.

A quantized layer's codes and scales have one reading for a known number of inputs. mlx-lm reads them so too
for layers that config.json does not name.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from olmo3_mlx.checkpoints.headers import TensorHeader
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import MODES, Quantization

_KEYS = ("quantization", "quantization_config")


def with_stored_quantization(
    data: Mapping[str, Any], headers: Mapping[str, TensorHeader], where: str
) -> Mapping[str, Any]:
    """The object of config.json, with bits, group size and mode of quantized layers where it leaves them out
    or names others for all; the same object where there is nothing to add. `where` names the file in errors.

    What it names for one layer stays. Raises ConfigError for an architecture that cannot be read.
    """
    entry: Any = next((data[key] for key in _KEYS if data.get(key) is not None), {})
    quantized = [name.removesuffix(".scales") for name in headers if name.endswith(".scales")]
    if not quantized or not isinstance(entry, Mapping) or entry.get("quant_method"):
        return data
    plain = {key: value for key, value in data.items() if key not in _KEYS}
    inputs = {path: shape[1] for path, shape in _shapes(plain, where).items()}
    found = {path: _scheme(headers, path, inputs[path]) for path in quantized if path in inputs}
    schemes = {path: scheme for path, scheme in found.items() if scheme is not None}
    if not schemes:
        return data
    usual = asdict(Counter(schemes.values()).most_common(1)[0][0])
    default = {key: entry[key] for key in usual if entry.get(key) is not None}
    if "bits" in default and "group_size" in default:
        usual = {"mode": "affine", **default}
    differing = {
        path: asdict(scheme)
        for path, scheme in schemes.items()
        if path not in entry and asdict(scheme) != usual
    }
    if not differing and usual == {"mode": "affine", **default}:
        return data
    return {**plain, "quantization": {**entry, **usual, **differing}}


def _shapes(data: Mapping[str, Any], where: str) -> dict[str, tuple[int, int]]:
    return Olmo3(Olmo3Config.from_dict(data, where)).quantizable()


def _scheme(headers: Mapping[str, TensorHeader], path: str, inputs: int) -> Quantization | None:
    """The one way to read a layer's codes and scales; None if there is none."""
    codes, scales = headers.get(f"{path}.weight"), headers[f"{path}.scales"]
    if codes is None or not codes.shape or not scales.shape or not scales.shape[-1] or not codes.shape[-1]:
        return None
    bits, rest = divmod(32 * codes.shape[-1], inputs)
    group_size, left = divmod(inputs, scales.shape[-1])
    if rest or left or codes.format != "U32":
        return None
    # Only affine keeps scales in a floating type, and biases beside them.
    for mode in [mode for mode in MODES if (mode == "affine") == (scales.format != "U8")]:
        if bits in MODES[mode][0] and group_size in MODES[mode][1]:
            return Quantization(bits, group_size, mode)
    return None

"""The quantization of a checkpoint's weights, as MLX writes it under `quantization` in config.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from olmo3_mlx.errors import ConfigError
from olmo3_mlx.fields import Fields

# What mx.quantize accepts: mode -> (bits, group sizes).
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}

# Bytes that mean NaN where scales are 8-bit floats: E8M0 in the OCP MX formats, E4M3 in NVFP4.
NAN_SCALES: Mapping[str, tuple[int, ...]] = {"mxfp4": (255,), "mxfp8": (255,), "nvfp4": (127, 255)}


@dataclass(frozen=True)
class Quantization:
    """One layer's quantization: `bits` for each weight, one scale for `group_size` weights."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def from_fields(cls, fields: Fields, outer: "Quantization | None" = None) -> "Quantization":
        """Read one object; what it leaves out comes from `outer`. Raises ConfigError."""
        mode = fields.data.get("mode") or (outer.mode if outer else "affine")
        if not isinstance(mode, str) or mode not in MODES:
            raise fields.refuse("mode", f"one of {', '.join(MODES)}")
        bits, groups = MODES[mode]
        found = cls(
            bits=fields.integer("bits", _inherited(outer, mode, "bits", bits)),
            group_size=fields.integer("group_size", _inherited(outer, mode, "group_size", groups)),
            mode=mode,
        )
        if found.bits not in bits:
            raise fields.refuse("bits", f"{one_of(bits)} in mode {mode}")
        if found.group_size not in groups:
            raise fields.refuse("group_size", f"{one_of(groups)} in mode {mode}")
        return found


@dataclass(frozen=True)
class QuantizationConfig:
    """The default for every quantized layer, and layers that differ: by path, None if not quantized."""

    default: Quantization
    overrides: Mapping[str, Quantization | None] = field(default_factory=dict)

    def of(self, path: str) -> Quantization | None:
        """The quantization of the layer at `path`; None where an override says it has none."""
        return self.overrides.get(path, self.default)

    @classmethod
    def from_config(cls, fields: Fields) -> "QuantizationConfig | None":
        """Read `quantization`, else `quantization_config`, of a config.json; None if neither is there.

        Raises ConfigError for what MLX did not write (GPTQ, AWQ, FP8, ...).
        """
        key = "quantization" if "quantization" in fields else "quantization_config"
        if key not in fields:
            return None
        entry = fields.fields(key)
        method = entry.data.get("quant_method")
        if method:
            raise ConfigError(
                f"{entry.where}: expected MLX's own quantization, got quant_method {method!r}; "
                f"load the original checkpoint and convert that"
            )
        default = Quantization.from_fields(entry)
        overrides: dict[str, Quantization | None] = {}
        for path, value in entry.data.items():
            if isinstance(value, dict):
                overrides[path] = Quantization.from_fields(entry.fields(path), default)
            elif value is False:
                overrides[path] = None
        return cls(default, overrides)


def one_of(allowed: tuple[int, ...]) -> str:
    """The allowed values as an error names them: "4", or "one of 2, 3, 4"."""
    return ("one of " if len(allowed) > 1 else "") + ", ".join(map(str, allowed))


def in_words(layers: Iterable[Quantization]) -> str:
    """A phrase for quantized layers: "4-bit affine, group size 64", or "mixed, 4 to 6 bits", or nothing."""
    kinds = set(layers)
    bits = sorted({layer.bits for layer in kinds})
    if len(kinds) == 1:
        return "".join(f"{one.bits}-bit {one.mode}, group size {one.group_size}" for one in kinds)
    if len(bits) == 1:
        return f"mixed, all {bits[0]}-bit"
    return f"mixed, {bits[0]} to {bits[-1]} bits" if bits else ""


def _inherited(outer: Quantization | None, mode: str, name: str, allowed: tuple[int, ...]) -> Any:
    """What a missing key means: the outer value in the same mode, else the mode's only choice."""
    if outer and outer.mode == mode:
        return getattr(outer, name)
    return allowed[0] if len(allowed) == 1 else None

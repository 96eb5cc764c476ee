"""The method by which a result was quantized: given by the conversion, or read off a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from convert.calibration.text import CalibratedOn
from convert.target import OPTIONS
from olmo3_mlx.quantization import Quantization


@dataclass(frozen=True)
class QuantizationMethod:
    """How a result was quantized.

    layers         the schemes of its quantized layers, by their paths
    chosen_by      the option that chose them: "bits", "recipe", "target_bpw" or "target_gb"; "" if nobody
                   knows
    bits           the bits that were asked for, if "bits" chose them
    calibrated     whether it was calibrated; None if nobody knows
    left_out       the inputs of layers that are not quantized as no group divides them, by path
    calibrated_on  the texts that it was calibrated on, if they are known
    """

    layers: Mapping[str, Quantization]
    chosen_by: str = ""
    bits: int | None = None
    calibrated: bool | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    calibrated_on: CalibratedOn | None = None

    @classmethod
    def of_checkpoint(
        cls, layers: Mapping[str, Quantization], inputs: Mapping[str, int], calibrated_on: CalibratedOn | None
    ) -> "QuantizationMethod":
        """Read the method off a checkpoint: its quantized `layers`, and the `inputs` of all that could be."""
        method = cls(layers, calibrated=None if calibrated_on is None else True, calibrated_on=calibrated_on)
        rest = {path: n for path, n in inputs.items() if path not in layers and n % method.group_size}
        return replace(method, left_out=rest)

    @property
    def weighed(self) -> bool:
        """Whether calibration weighed the layers and chose bits and groups for each."""
        return bool(self.calibrated) and self.chosen_by in ("bits", *OPTIONS)

    @property
    def affine(self) -> bool:
        """Whether all layers are in mode affine."""
        return all(scheme.mode == "affine" for scheme in self.layers.values())

    @property
    def group_size(self) -> int:
        """The largest group size, 64 if nobody knows."""
        return max((scheme.group_size for scheme in self.layers.values()), default=64)

    def can_grow(self, path: str = "model") -> bool:
        """Whether a layer at or below a path could have more bits than it has."""
        below = [scheme.bits for name, scheme in self.layers.items() if f"{name}.".startswith(f"{path}.")]
        return not self.layers or min(below, default=8) < 8

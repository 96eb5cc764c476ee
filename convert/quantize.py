"""Which tensors are quantized, how, and the quantizing itself: rounding to nearest."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from olmo3_mlx.errors import ConvertError, OptionError
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import MODES, Quantization


@dataclass(frozen=True)
class Recipe:
    """What becomes of each tensor: quantized by `how` if its layer is among `layers`, else cast.

    `left_out` are layers that would be quantized if the group size divided their inputs.
    """

    how: Quantization | None
    dtype: mx.Dtype | None
    layers: frozenset[str]
    left_out: tuple[str, ...]

    @classmethod
    def make(cls, model: Olmo3, how: Quantization | None, dtype: mx.Dtype | None) -> "Recipe":
        """Choose the linear layers, embedding and head of `model`. Raises ConvertError if the group
        size divides none of them.
        """
        if how is None:
            return cls(None, dtype, frozenset(), ())
        widths = {
            path: module.weight.shape[-1]
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        }
        layers = frozenset(path for path, width in widths.items() if width % how.group_size == 0)
        if not layers:
            raise ConvertError(
                f"group size {how.group_size} divides the inputs of no layer "
                f"({', '.join(map(str, sorted(set(widths.values()))))}): nothing would be quantized: "
                f"take a smaller one"
            )
        return cls(how, dtype, layers, tuple(sorted(widths.keys() - layers)))

    def cast(self, weight: mx.array) -> mx.array:
        """`weight` in the recipe's dtype, if it has one."""
        return weight if self.dtype is None else weight.astype(self.dtype)

    def apply(self, name: str, weight: mx.array) -> dict[str, mx.array]:
        """The tensors that `weight` becomes, by name, lazily."""
        weight = self.cast(weight)
        path = name.removesuffix(".weight")
        if self.how is None or path not in self.layers:
            return {name: weight}
        parts = mx.quantize(weight, group_size=self.how.group_size, bits=self.how.bits, mode=self.how.mode)
        names = (name, f"{path}.scales", f"{path}.biases")
        return dict(zip(names, parts, strict=True))

    def bytes_of(self, name: str, weight: mx.array) -> int:
        """Bytes of what `weight` becomes; nothing is evaluated."""
        return sum(array.nbytes for array in self.apply(name, weight).values())


def affine(bits: int, group_size: int) -> Quantization:
    """MLX's affine quantization. Raises OptionError for bits or a group size that it does not have."""
    allowed_bits, allowed_groups = MODES["affine"]
    if bits not in allowed_bits:
        raise OptionError(f"bits must be one of {allowed_bits}, not {bits}")
    if group_size not in allowed_groups:
        raise OptionError(f"group_size must be one of {allowed_groups}, not {group_size}")
    return Quantization(bits, group_size)

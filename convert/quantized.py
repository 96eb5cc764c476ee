"""A quantized layer in a checkpoint: the tensors that its weight becomes, by rounding, and the way back."""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.quantization import Quantization


def part_names(name: str) -> tuple[str, str, str]:
    """The tensors that the weight `name` becomes: codes under its own name, scales, and biases if affine."""
    path = name.removesuffix(".weight")
    return name, f"{path}.scales", f"{path}.biases"


def rounded(name: str, weight: mx.array, scheme: Quantization | None) -> dict[str, mx.array]:
    """Round rows of a weight to nearest: their codes, scales and perhaps biases by name, lazily; without a
    scheme they stay as they are.
    """
    if scheme is None:
        return {name: weight}
    parts = mx.quantize(weight, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
    return dict(zip(part_names(name), parts, strict=False))


def dequantized(parts: Sequence[mx.array], scheme: Quantization) -> mx.array:
    """The weights that codes, scales and, if the mode has any, biases stand for, in float32, lazily."""
    codes, scales, *biases = parts
    if scheme.mode == "affine":  # in the scales' own precision the products would be rounded
        scales, biases = scales.astype(mx.float32), [b.astype(mx.float32) for b in biases]
    return mx.dequantize(
        codes,
        scales,
        biases[0] if biases else None,
        group_size=scheme.group_size,
        bits=scheme.bits,
        mode=scheme.mode,
        dtype=mx.float32,
    )

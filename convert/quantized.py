"""Quantizing by rounding to nearest."""

import mlx.core as mx

from olmo3_mlx.quantization import Quantization


def rounded(name: str, weight: mx.array, how: Quantization | None) -> dict[str, mx.array]:
    """What rows of a weight become, by name: themselves, or codes, scales and perhaps biases, lazily."""
    if how is None:
        return {name: weight}
    path = name.removesuffix(".weight")
    parts = mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode)
    return dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))

"""Whole numbers of few bits, packed as MLX holds quantized weights: one stream of bits, the lowest first."""

import mlx.core as mx


def packed(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., n] below 2 ** bits -> uint32 [..., n * bits / 32]; `bits` is 2, 3, 4, 5, 6 or 8, and n a
    multiple of 32.
    """
    if bits == 8:
        return codes.astype(mx.uint8).view(mx.uint32)
    shifts = mx.arange(0, 32, bits).astype(mx.uint32)
    if 32 % bits == 0:
        return (mx.unflatten(codes.astype(mx.uint32), -1, (-1, 32 // bits)) << shifts).sum(axis=-1)
    eight = mx.unflatten(codes.astype(mx.uint32), -1, (-1, 8))  # they take `bits` bytes
    begun = min(8, len(shifts))  # codes that begin in the first 32 bits; what passes those is lost there
    low = (eight[..., :begun] << shifts[:begun]).sum(axis=-1, keepdims=True).view(mx.uint8)
    if bits < 4:
        return low[..., :bits].flatten(-2).view(mx.uint32)
    high = eight[..., begun - 1 : begun] >> (32 - (begun - 1) * bits)
    for place in range(begun, 8):
        high = high | (eight[..., place : place + 1] << (place * bits - 32))
    return mx.concatenate([low, high.view(mx.uint8)[..., : bits - 4]], axis=-1).flatten(-2).view(mx.uint32)

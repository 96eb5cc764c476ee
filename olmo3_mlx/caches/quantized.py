"""Keys and values in 8 or 4 bits, and attention over them without unpacking the whole cache.

A head's key is rotated by a Hadamard transform, which spreads outlying channels over all of them and
leaves its products with equally rotated queries as they were (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456). Keys and values are then rounded symmetrically with one scale for `group_size`
values: the value of largest magnitude gets the code of largest magnitude, then the scale is refitted
by least squares. A position's codes depend on that position alone, so that rewinding and any split
into chunks are exact (of a cache that is quantized late, from then on).

Shapes: B batch, H query heads, K key-value heads, L queries, S positions held, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, cast

import mlx.core as mx

from olmo3_mlx.caches.attention import attention, pace, visible
from olmo3_mlx.errors import OptionError, Setting
from olmo3_mlx.packing import packed

# Bits of keys and values. At 4 bits values get a fifth, as their errors cost more (docs/decisions).
BITS = {8: (8, 8), 4: (4, 5)}
GROUP_SIZES = (32, 64, 128)

FEW_QUERIES = 8  # up to here the products with packed keys beat unpacking them
UNPACKED_BYTES = 2**28  # keys and values that are unpacked at a time


@dataclass(frozen=True)
class KVQuantization:
    """The form of quantized keys and values. Raises OptionError for what MLX's kernels cannot multiply with.

    bits        8 or 4 (then 5 for values)
    group_size  values that share a scale: 32, 64 or 128, dividing `head_dim`
    """

    bits: int
    group_size: int
    head_dim: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group_size not in GROUP_SIZES or self.head_dim % self.group_size:
            raise OptionError(
                Setting("kv_group_size"),
                f" must be 32, 64 or 128 and divide the head dimension {self.head_dim}, "
                f"not {self.group_size}",
            )

    @classmethod
    def of(cls, bits: int, group_size: int | None, head_dim: int) -> "KVQuantization":
        """With one scale for as much of a head as MLX's groups reach, unless `group_size` is given."""
        largest = max((size for size in GROUP_SIZES if head_dim % size == 0), default=None)
        if group_size is None and largest is None:
            raise OptionError(
                Setting("kv_bits", bits),
                f" is for heads of a multiple of {min(GROUP_SIZES)} values, this model's have {head_dim}: "
                f"leave it out",
            )
        return cls(bits, group_size or largest or head_dim, head_dim)

    def encode(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Keys and values [B, K, L, D] to codes (uint32) and scales of both, [B, K, L, ...] each."""
        one = keys.shape[2] == 1 and mx.default_device().type == mx.DeviceType.gpu
        return list((_encode_one if one else _encode)(self, keys, values))

    def attention(
        self, queries: mx.array, arrays: list[mx.array], span: slice, *, scale: float, window: int
    ) -> mx.array:
        """`olmo3_mlx.caches.attention.attention` over the positions `span` of what `encode` gave."""
        keys, values = self.packed(arrays)
        queries = (_rotated(queries) * scale).astype(queries.dtype)
        if queries.shape[2] <= FEW_QUERIES and _multiplies_packed():
            return _attention_packed(queries, keys, values, span, window)
        # Many queries: a few heads at a time, so that only their keys and values are ever unpacked.
        batch, heads = keys.codes.shape[:2]
        together = queries.shape[1] // heads
        one = 2 * batch * (span.stop - span.start) * self.head_dim * queries.itemsize
        each = max(1, UNPACKED_BYTES // one)
        pieces = []
        for first in range(0, heads, each):
            some = slice(first, first + each)
            pieces.append(
                attention(
                    queries[:, first * together : (first + each) * together],
                    keys.unpacked(queries.dtype, some, span),
                    values.unpacked(queries.dtype, some, span),
                    scale=1.0,
                    window=window,
                )
            )
            pace(pieces)
        return mx.concatenate(pieces, axis=1)

    def is_encoded(self, arrays: list[mx.array]) -> bool:
        """True if these are what `encode` of this quantization gives."""
        dims = [a.shape[-1] for a in arrays]
        groups = self.head_dim // self.group_size
        codes = [self.head_dim * bits // 32 for bits in BITS[self.bits]]
        return dims == [codes[0], groups, codes[1], groups]

    def packed(self, arrays: list[mx.array]) -> tuple["Packed", "Packed"]:
        """The rotated keys, and the values, that are packed in what `encode` gave."""
        key_bits, value_bits = BITS[self.bits]
        return (
            Packed(arrays[0], arrays[1], key_bits, self.group_size),
            Packed(arrays[2], arrays[3], value_bits, self.group_size),
        )


def _multiplies_packed() -> bool:
    """False where keys and values are always unpacked: on CUDA, where MLX 0.32.4 gives wrong products with
    several packed matrices at once, and with views of one (docs/decisions).
    """
    return mx.default_device().type == mx.DeviceType.cpu or mx.metal.is_available()


def check_bits(bits: int) -> None:
    """Raise OptionError unless caches can be quantized to so many bits."""
    if type(bits) is not int or bits not in BITS:
        raise OptionError(Setting("kv_bits"), f" must be one of {', '.join(map(str, BITS))}, not {bits!r}")


def check_group_size(group_size: int) -> None:
    """Raise OptionError unless so many values can share a scale."""
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise OptionError(Setting("kv_group_size"), f" must be 32, 64 or 128, not {group_size!r}")


class Packed(NamedTuple):
    """Codes [B, K, S, D * bits / 32] and scales [B, K, S, D / group_size] of keys or of values."""

    codes: mx.array
    scales: mx.array
    bits: int
    group_size: int

    def times(self, x: mx.array, *, transpose: bool) -> mx.array:
        """x [B, K, L, D] with these transposed -> [B, K, L, S], or x [B, K, L, S] -> [B, K, L, D]."""
        biases = self.scales * -(2 ** (self.bits - 1))  # the middle code stands for 0
        return mx.quantized_matmul(
            x,
            self.codes,
            self.scales,
            biases,
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
        )

    def unpacked(self, dtype: mx.Dtype, heads: slice = slice(None), span: slice = slice(None)) -> mx.array:
        """These heads and positions as numbers, [B, K, S, D]."""
        scales = self.scales[:, heads, span]
        biases = scales * -(2 ** (self.bits - 1))
        return mx.dequantize(
            self.codes[:, heads, span],
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            dtype=dtype,
        )


def _attention_packed(queries: mx.array, keys: Packed, values: Packed, span: slice, window: int) -> mx.array:
    """For few (scaled) queries: products with the packed keys and values themselves."""
    heads, room = keys.codes.shape[1:3]
    length, seen = queries.shape[2], span.stop - span.start
    grouped = mx.unflatten(queries, 1, (heads, -1)).flatten(2, 3)  # [B, K, H / K * L, D]
    # All the room and not a view of it, as not every backend multiplies with views; what lies outside
    # of `span` is cut off, or weighs nothing.
    scores = keys.times(grouped, transpose=True)[..., span]
    if length > 1:
        mask = visible(length, seen - length, window)
        asking = mx.unflatten(scores, 2, (-1, length))
        scores = mx.where(mask, asking, mx.finfo(scores.dtype).min).flatten(2, 3)
    weights = mx.softmax(scores, axis=-1, precise=True)
    weights = mx.pad(weights, [(0, 0), (0, 0), (0, 0), (span.start, room - span.stop)])
    out = values.times(weights, transpose=False)
    return out.reshape(queries.shape)


@dataclass(frozen=True)
class QuantizedKeysValues:
    """Positions `start` to `stop` of a cache's arrays: what its newest queries may look at."""

    quantization: KVQuantization
    arrays: list[mx.array]
    start: int
    stop: int

    def attention(self, queries: mx.array, *, scale: float, window: int) -> mx.array:
        """`olmo3_mlx.caches.attention.attention` for these keys and values."""
        span = slice(self.start, self.stop)
        return self.quantization.attention(queries, self.arrays, span, scale=scale, window=window)


def _encode(quantization: KVQuantization, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
    key_bits, value_bits = BITS[quantization.bits]
    return (
        *_rounded(_rotated(keys), key_bits, quantization.group_size, keys.dtype),
        *_rounded(values, value_bits, quantization.group_size, values.dtype),
    )


def _encode_one(quantization: KVQuantization, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
    """The same in fewer kernels, for a decoding step on a GPU, where each of them is a wait."""
    return _compiled(quantization)(keys, values)


@lru_cache
def _compiled(quantization: KVQuantization) -> Callable[[mx.array, mx.array], tuple[mx.array, ...]]:
    return cast(
        Callable[[mx.array, mx.array], tuple[mx.array, ...]], mx.compile(partial(_encode, quantization))
    )


def _rotated(x: mx.array) -> mx.array:
    """In float32, as its sums may pass what float16 can hold."""
    return mx.hadamard_transform(x.astype(mx.float32))  # scaled so that it is its own inverse


def _rounded(
    x: mx.array, bits: int, group_size: int, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array]:
    """x [..., D] to codes [..., D * bits / 32] and scales [..., D / group_size] of `dtype`."""
    half = 2 ** (bits - 1)
    groups = mx.unflatten(x.astype(mx.float32), -1, (-1, group_size))
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scales = mx.where(high > -low, high, low) / -half
    scales = mx.where(scales == 0, 1, scales)
    codes = mx.clip(mx.round(groups / scales), -half, half - 1)
    squares = mx.maximum((codes * codes).sum(axis=-1, keepdims=True), 1)
    scales = (codes * groups).sum(axis=-1, keepdims=True) / squares
    scales = mx.where(scales == 0, 1, scales).astype(dtype)
    codes = mx.clip(mx.round(groups / scales.astype(mx.float32)), -half, half - 1) + half
    return packed(codes.flatten(-2), bits), scales.squeeze(-1)

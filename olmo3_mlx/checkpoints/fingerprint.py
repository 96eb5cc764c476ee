"""Which weights a model has, in one short text: what is kept on disk says for which it was made."""

import hashlib

import mlx.core as mx

from olmo3_mlx.caches.quantized import KVQuantization
from olmo3_mlx.model import Olmo3

_SLAB = 2**22  # words summed at a time


def identity(model: Olmo3) -> str:
    """A fingerprint of the architecture and all weights, each in its place. Reads each weight once."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(model.tensors().items()):
        digest.update(f"{name} {weight.dtype} {weight.shape} {_sums(weight)}".encode())
    return digest.hexdigest()[:32]


def _sums(weight: mx.array) -> list[int]:
    """Of the bits, slab by slab, each word times an odd number that belongs to its place, modulo 2 ** 32:
    a change, and an exchange of two, show. On the device, where a proper hash would be slow.
    """
    bits = mx.contiguous(weight).reshape(-1).view(mx.uint8 if weight.nbytes % 4 else mx.uint32)
    sums = []
    for start in range(0, bits.size, _SLAB):
        words = bits[start : start + _SLAB].astype(mx.uint32)
        words = words ^ (words >> 15)  # else the highest bits, signs say, would cancel in pairs
        places = mx.arange(words.size).astype(mx.uint32) * 2654435761 * 2 + 1
        sums.append(int(mx.sum(words * places).item()))  # type: ignore[arg-type]
    return sums


def cache_form(
    model: Olmo3, kv_bits: int | None = None, kv_group_size: int | None = None, kv_start: int = 0
) -> str:
    """What must be equal, besides the weights, for one cache to take another's positions."""
    dtype = str(model.model.norm.weight.dtype).rpartition(".")[2]
    if kv_bits is None:
        return dtype
    how = KVQuantization.of(kv_bits, kv_group_size, model.config.head_dim)
    return f"{dtype}, {how.bits} bits in groups of {how.group_size} from {kv_start} tokens on"

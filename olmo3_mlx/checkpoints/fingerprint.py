"""A model's fingerprint: one short text that tells its weights from all others."""

import hashlib

import mlx.core as mx

from olmo3_mlx.model import Olmo3

_SLAB = 2**22  # 32-bit words summed at a time


def fingerprint(model: Olmo3) -> str:
    """A text that changes with the architecture and with any weight. Reads each weight once."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(model.tensors().items()):
        digest.update(f"{name} {weight.dtype} {weight.shape} {_sums(weight)}".encode())
    return digest.hexdigest()[:32]


def _sums(weight: mx.array) -> list[int]:
    """Sums of a weight's bits, slab by slab: each 32-bit word times an odd number that belongs to its place,
    modulo 2 ** 32. A change shows, and so does an exchange of two values. It runs on the device, where a
    proper hash would be slow.
    """
    bits = mx.contiguous(weight).reshape(-1).view(mx.uint8 if weight.nbytes % 4 else mx.uint32)
    sums = []
    for start in range(0, bits.size, _SLAB):
        values = bits[start : start + _SLAB].astype(mx.uint32)
        values = values ^ (values >> 15)  # else the highest bits, signs say, would cancel in pairs
        places = mx.arange(values.size).astype(mx.uint32) * 2654435761 * 2 + 1
        sums.append(int(mx.sum(values * places).item()))  # type: ignore[arg-type]
    return sums

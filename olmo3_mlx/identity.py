"""Which weights a model has, in one short text: what is kept on disk says for which it was made."""

import hashlib

import mlx.core as mx

from olmo3_mlx.model import Olmo3


def identity(model: Olmo3) -> str:
    """A fingerprint of the architecture and all weights. Reads each weight once: about the time of a
    decoding step.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(model.tensors().items()):
        sums = _sums(weight)
        digest.update(f"{name} {weight.dtype} {weight.shape} {sums}".encode())
    return digest.hexdigest()[:32]


def _sums(weight: mx.array) -> list[int]:
    """Of the bits, all and every third, modulo 2 ** 32: a changed weight changes the first."""
    bits = mx.contiguous(weight).reshape(-1).view(mx.uint8 if weight.nbytes % 4 else mx.uint32)
    return [int(mx.sum(some.astype(mx.uint32)).item()) for some in (bits, bits[::3])]  # type: ignore[arg-type]


def cache_form(model: Olmo3, kv_bits: int | None = None, kv_group_size: int | None = None) -> str:
    """What must be equal, besides the weights, for one cache to take another's positions."""
    dtype = str(model.model.norm.weight.dtype).rpartition(".")[2]
    bits = "" if kv_bits is None else f", {kv_bits} bits, group size {kv_group_size or 'of a head'}"
    return f"{dtype}{bits}"

"""What one pass through the model needs beside weights and caches: an estimate from above, in bytes.

A sum of what can live at once, as MLX allocates ahead of what it runs. How often each array counts was
fitted to peaks that MLX reported: on the CPU backend, where tests/test_memory.py holds the estimate to
within a factor of 2.2, and on an H100 for the 7B's shape. Caches are taken to grow layer by layer.
Shapes: L new tokens, S positions that attention sees, H query heads, D head dimension.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from olmo3_mlx.caches.attention import _BLOCK_BYTES as BLOCK_BYTES
from olmo3_mlx.caches.cache import KVCache, RotatingKVCache
from olmo3_mlx.caches.quantized import _FEW_QUERIES as FEW_QUERIES
from olmo3_mlx.caches.quantized import _UNPACKED_BYTES as UNPACKED_BYTES
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config
from olmo3_mlx.memory.sizes import layer_counts, position_bytes
from olmo3_mlx.model import _PACED_FROM as PACED_FROM


class _Counts(NamedTuple):
    """How many arrays [L, width] of one layer live at once, by width."""

    hidden: int  # its input, what attention and feed-forward put out, their norms, the sums
    queries: int  # projected, normed, rotated, scaled, and what attention makes of them
    keys: int  # and values
    intermediate: int  # gate, up, and the steps of SwiGLU


_ON_CPU, _ON_GPU = _Counts(7, 6, 5, 5), _Counts(4, 4, 4, 5)  # as few as bound what was measured

_ENCODE_BYTES = 23  # for one value while it is quantized, in float32 (measured)
# For one value unpacked on the CPU, which has no kernel for it and goes through integers (measured).
_UNPACK_BYTES_ON_CPU = {8: 10, 4: 18}
_AHEAD_BYTES = 700 * 2**20  # temporaries of short passes that a GPU is behind Python (measured)
_MARGIN = 9 / 8  # for what the sum leaves out
_SAMPLING = 8  # float32 arrays [V]: probabilities, sorted, summed, masked, ...


def working_bytes(
    config: Olmo3Config,
    chunk: int,
    context: int,
    *,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    kv_start: int = 0,
    rewind: int = 512,
    itemsize: int = 2,
    on_gpu: bool | None = None,
) -> int:
    """What a pass of `chunk` tokens takes for a while, when the caches hold `context` after it.

    A decoding step is a chunk of 1. `itemsize` is the bytes of a number that the model computes in;
    `on_gpu` says what it runs on, left out MLX's default device; the rest are `make_caches`'s
    arguments. Raises OptionError where that does.
    """
    gpu = mx.default_device().type == mx.DeviceType.gpu if on_gpu is None else on_gpu
    chunk = min(chunk, context)
    one = _Pass(config, chunk, context, kv_bits, kv_group_size, kv_start, rewind, itemsize, gpu)
    sliding, full = layer_counts(config)
    kinds = [kind for kind, count in ((SLIDING, sliding), (FULL, full)) if count]
    temporaries = _at_once(max(one.layer(kind) for kind in kinds), sliding + full, chunk, gpu)
    return int((temporaries + max(one.growth(kind) for kind in kinds) + one.head()) * _MARGIN)


def passes(chunk: int) -> set[int]:
    """The lengths of pass that may need most, when a prompt is read `chunk` tokens at a time."""
    return {min(chunk, length) for length in (1, PACED_FROM - 1, chunk)}


def _at_once(layer: int, layers: int, length: int, on_gpu: bool) -> int:
    """Temporaries of all the layers that are under way at a time, if one layer's take `layer`."""
    if not on_gpu:  # the CPU backend runs few operations ahead
        return layer
    if length >= PACED_FROM:  # see `pace`
        return min(layers, 2) * layer
    # As far ahead as MLX queues: in the 7B's shape 7 layers of 20 MiB each, 2 of 300 MiB.
    return min(layers * layer, 12 * layer, max(3 * layer, _AHEAD_BYTES))


@dataclass(frozen=True)
class _Pass:
    """One pass of `length` tokens, after which the caches hold `context`."""

    config: Olmo3Config
    length: int
    context: int
    kv_bits: int | None
    kv_group_size: int | None
    kv_start: int
    rewind: int
    itemsize: int
    on_gpu: bool

    def layer(self, layer_type: str) -> int:
        """Temporaries of one layer, its attention and what goes into its cache included."""
        seen, mask = self._seen(layer_type)
        masks = self.length * seen if mask or not self.on_gpu else 0  # booleans
        scores = self._scores(seen, mask, layer_type)
        return (
            self._projections()
            + masks
            + scores
            + self._quantized(seen, layer_type)
            + self._joined(layer_type)
        )

    def growth(self, layer_type: str) -> int:
        """The old arrays of one layer's cache, which stay until they are copied into larger ones."""
        held = self._position() * self._room(layer_type)
        if self.kv_bits is None or self.context <= self.kv_start:
            return held
        plain = position_bytes(self.config, itemsize=self.itemsize)  # until they are quantized
        return max(held, plain * min(self._room(layer_type), self.kv_start))

    def head(self) -> int:
        """The last position's logits, and what sampling makes of them."""
        return self.config.vocab_size * (self.itemsize + 4 * _SAMPLING)

    def _projections(self) -> int:
        c, count = self.config, _ON_GPU if self.on_gpu else _ON_CPU
        heads = count.queries * c.num_attention_heads + count.keys * c.num_key_value_heads
        rotated = self.itemsize if self.on_gpu else 4  # the CPU backend does it in float32
        others = count.hidden * c.hidden_size + count.intermediate * c.intermediate_size
        return self.length * (heads * c.head_dim * rotated + others * self.itemsize)

    def _seen(self, layer_type: str) -> tuple[int, bool]:
        """How many positions the queries see together, and whether a mask has to say who sees what."""
        if layer_type == FULL:
            return self.context, False
        window = self.config.sliding_window
        seen = min(self.context, window - 1 + self.length)
        return seen, seen > window

    def _scores(self, seen: int, mask: bool, layer_type: str) -> int:
        """Scores of the queries that `attention` takes at once, where they are written."""
        if self.on_gpu and not mask:  # MLX's fused kernels keep them to themselves
            return 0
        window = 0 if layer_type == FULL else self.config.sliding_window
        row = self.config.num_attention_heads * self.itemsize
        rows = min(self.length, max(32, BLOCK_BYTES // (row * seen) // 32 * 32))
        reach = min(seen, window - 1 + rows) if window else seen
        return (2 if self.on_gpu else 1) * row * rows * reach

    def _quantized(self, seen: int, layer_type: str) -> int:
        """What quantizing new keys and values, and attending to packed ones, takes."""
        if self.kv_bits is None or self.context <= self.kv_start:
            return 0
        c = self.config
        values = 2 * c.num_key_value_heads * c.head_dim  # at one position
        # Beyond kv_start all that is held so far is quantized at once.
        encoded = _ENCODE_BYTES * values * max(self.length, min(self.kv_start, seen))
        if self.length <= FEW_QUERIES:
            scores = 4 * c.num_attention_heads * self.length
            affine = 2 * values // 32  # biases, for groups of 32 at the least
            return encoded + (scores + affine) * self._room(layer_type) * self.itemsize
        together = max(UNPACKED_BYTES, 2 * seen * c.head_dim * self.itemsize)
        unpacked = min(values * seen * self.itemsize, together)
        if not self.on_gpu:
            unpacked = unpacked // self.itemsize * _UNPACK_BYTES_ON_CPU[self.kv_bits]
        return encoded + unpacked

    def _joined(self, layer_type: str) -> int:
        """Old and new positions as one array, where a rotating cache will not hold them all."""
        cache = RotatingKVCache(self.config.sliding_window, self.rewind)
        if layer_type == FULL or cache.kept + self.length <= cache.capacity:
            return 0
        old = min(self.context - self.length, cache.kept)
        return self._position() * (old + self.length) if old > 0 else 0

    def _position(self) -> int:
        bits = self.kv_bits if self.context > self.kv_start else None
        return position_bytes(
            self.config, kv_bits=bits, kv_group_size=self.kv_group_size, itemsize=self.itemsize
        )

    def _room(self, layer_type: str) -> int:
        if layer_type == FULL:
            return KVCache.room_for(self.context)
        return RotatingKVCache(self.config.sliding_window, self.rewind).room_for(self.context)

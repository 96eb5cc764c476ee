"""What one pass through the model needs beside weights and caches: an estimate from above, in bytes.

A sum of what can live at once, as MLX allocates ahead of what it runs. How often each array counts was
fitted to peaks that MLX reported: on the CPU backend, where tests/test_memory.py holds the estimate to
within a factor of 2.2, and on an H100 for the 7B's shape. Caches are taken to grow layer by layer.
Shapes: L new tokens, S positions that attention sees, H query heads, D head dimension.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from olmo3_mlx.caches.attention import SCORES_BYTES
from olmo3_mlx.caches.growing import KVCache
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.caches.quantized import FEW_QUERIES, UNPACKED_BYTES
from olmo3_mlx.caches.rotating import RotatingKVCache
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config
from olmo3_mlx.memory.sizes import layer_counts
from olmo3_mlx.model import PACED_FROM


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
    options: CacheOptions | None = None,
    *,
    itemsize: int = 2,
    on_gpu: bool | None = None,
) -> int:
    """What a pass of `chunk` tokens takes for a while, when the caches hold `context` after it.

    A decoding step is a chunk of 1. `options` are those of the caches; `itemsize` is the bytes of a number
    that the model computes in; `on_gpu` says what it runs on, left out MLX's default device. Raises
    OptionError where `make_caches` does.
    """
    gpu = mx.default_device().type == mx.DeviceType.gpu if on_gpu is None else on_gpu
    chunk = min(chunk, context)
    one = _Pass(config, chunk, context, options or CacheOptions(), itemsize, gpu)
    sliding, full = layer_counts(config)
    layer_types = [name for name, count in ((SLIDING, sliding), (FULL, full)) if count]
    temporaries = _at_once(max(one.layer(name) for name in layer_types), sliding + full, chunk, gpu)
    return int((temporaries + max(one.growth(name) for name in layer_types) + one.head()) * _MARGIN)


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
    options: CacheOptions
    itemsize: int
    on_gpu: bool

    @property
    def _quantizes(self) -> bool:
        return self.options.holding(self.context).bits is not None

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
        if not self._quantizes:
            return held
        plain = self._position(tokens=0)  # until they are quantized
        return max(held, plain * min(self._room(layer_type), self.options.start))

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
        rows = min(self.length, max(32, SCORES_BYTES // (row * seen) // 32 * 32))
        reach = min(seen, window - 1 + rows) if window else seen
        return (2 if self.on_gpu else 1) * row * rows * reach

    def _quantized(self, seen: int, layer_type: str) -> int:
        """What quantizing new keys and values, and attending to packed ones, takes."""
        bits = self.options.holding(self.context).bits
        if bits is None:
            return 0
        c = self.config
        values = 2 * c.num_key_value_heads * c.head_dim  # at one position
        # Beyond kv_start all that is held so far is quantized at once.
        encoded = _ENCODE_BYTES * values * max(self.length, min(self.options.start, seen))
        if self.length <= FEW_QUERIES:
            scores = 4 * c.num_attention_heads * self.length
            affine = 2 * values // 32  # biases, for groups of 32 at the least
            return encoded + (scores + affine) * self._room(layer_type) * self.itemsize
        together = max(UNPACKED_BYTES, 2 * seen * c.head_dim * self.itemsize)
        unpacked = min(values * seen * self.itemsize, together)
        if not self.on_gpu:
            unpacked = unpacked // self.itemsize * _UNPACK_BYTES_ON_CPU[bits]
        return encoded + unpacked

    def _joined(self, layer_type: str) -> int:
        """Old and new positions as one array, where a rotating cache will not hold them all."""
        cache = RotatingKVCache(self.config.sliding_window, self.options.rewind)
        if layer_type == FULL or cache.kept + self.length <= cache.capacity:
            return 0
        old = min(self.context - self.length, cache.kept)
        return self._position() * (old + self.length) if old > 0 else 0

    def _position(self, tokens: int | None = None) -> int:
        """Bytes of a position of one layer, in the form in which so many tokens are held: after this pass
        unless given.
        """
        form = self.options.holding(self.context if tokens is None else tokens)
        return form.position_bytes(self.config.num_key_value_heads, self.config.head_dim, self.itemsize)

    def _room(self, layer_type: str) -> int:
        if layer_type == FULL:
            return KVCache.room_for(self.context)
        return RotatingKVCache(self.config.sliding_window, self.options.rewind).room_for(self.context)

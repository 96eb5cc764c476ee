"""What weights and caches take, before they are there. All in bytes, and exact.

Nothing is evaluated: MLX builds modules and reads checkpoints lazily, so that shapes and dtypes are
known for free. What a pass needs on top is in `working_space`, what fits a machine in `memory_plan`.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from olmo3_mlx.caches.cache import KVCache, RotatingKVCache
from olmo3_mlx.caches.quantized import BITS, KVQuantization
from olmo3_mlx.checkpoints.checkpoint import default_dtype, read_weights
from olmo3_mlx.config import FULL, Olmo3Config
from olmo3_mlx.errors import OptionError
from olmo3_mlx.model import Olmo3

PARTS = ("embedding", "attention", "feed-forward", "norms", "head")


def parameters_by_part(config: Olmo3Config) -> dict[str, int]:
    """How many parameters each part has; their sum is the model's."""
    parts = dict.fromkeys(PARTS, 0)
    for name, array in Olmo3(config).tensors().items():
        parts[_part(name)] += array.size
    return parts


def weight_bytes(config: Olmo3Config, bits: int | None = None, group_size: int = 64) -> int:
    """Weights in bfloat16, or with all linear layers, embedding and head at `bits` (affine)."""
    model = Olmo3(config)
    model.set_dtype(mx.bfloat16)
    if bits is not None:
        divided = {path for path, (_, inputs) in model.quantizable().items() if inputs % group_size == 0}
        nn.quantize(model, group_size=group_size, bits=bits, class_predicate=lambda path, _: path in divided)
    return sum(array.nbytes for array in model.tensors().values())


def stored_weight_bytes(folder: Path, dtype: mx.Dtype | None = None) -> int:
    """What the weights in a checkpoint's folder will take once loaded; only headers are read.

    Floats become `dtype`, which left out is what `load` would choose: see `default_dtype`.

    Raises CheckpointError for files that are missing or damaged.
    """
    weights = read_weights(folder)
    dtype = dtype or default_dtype(weights)
    return sum(w.size * _loaded(w, dtype).size for w in weights.values())


def stored_itemsize(folder: Path, dtype: mx.Dtype | None = None) -> int:
    """Bytes of one number in the caches of the model that this folder becomes; see above."""
    weights = read_weights(folder)
    # A model computes in its norms' dtype, and those are never quantized.
    norm = weights.get("model.norm.weight")
    dtype = dtype or default_dtype(weights)
    return 2 if norm is None else _loaded(norm, dtype).size


def cache_bytes(
    config: Olmo3Config,
    tokens: int,
    *,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    kv_start: int = 0,
    rewind: int = 512,
    itemsize: int = 2,
) -> int:
    """What the caches of `Olmo3.make_caches` take when they hold `tokens`, in one sequence.

    Room to spare and what can be taken back are included. `itemsize` is the bytes of a number where
    keys and values are not quantized, and of a scale where they are (2: bfloat16); the rest are
    `make_caches`'s arguments. Raises OptionError where that does.
    """
    for name, value in (("rewind", rewind), ("kv_start", kv_start)):
        if value < 0:
            raise OptionError(f"{name} must be 0 or more, not {value}")
    quantized = kv_bits if tokens > kv_start else None
    position = position_bytes(config, kv_bits=quantized, kv_group_size=kv_group_size, itemsize=itemsize)
    sliding, full = layer_counts(config)
    rotating = RotatingKVCache(config.sliding_window, rewind).room_for(tokens) if sliding else 0
    return position * (sliding * rotating + full * KVCache.room_for(tokens))


def position_bytes(
    config: Olmo3Config, *, kv_bits: int | None = None, kv_group_size: int | None = None, itemsize: int = 2
) -> int:
    """A key and a value of all heads at one position of one layer; arguments as for `cache_bytes`."""
    heads, dim = config.num_key_value_heads, config.head_dim
    if kv_bits is None:
        return 2 * heads * dim * itemsize
    how = KVQuantization.of(kv_bits, kv_group_size, dim)
    scales = 2 * dim // how.group_size * itemsize
    return heads * (sum(BITS[how.bits]) * dim // 8 + scales)


def layer_counts(config: Olmo3Config) -> tuple[int, int]:
    """How many layers slide, and how many see everything."""
    full = config.layer_types.count(FULL)
    return config.num_hidden_layers - full, full


def _loaded(weight: mx.array, dtype: mx.Dtype | None) -> mx.Dtype:
    return dtype if dtype is not None and mx.issubdtype(weight.dtype, mx.floating) else weight.dtype


def _part(name: str) -> str:
    if "norm" in name:
        return "norms"
    for key, part in (
        ("embed_tokens", "embedding"),
        ("self_attn", "attention"),
        ("mlp", "feed-forward"),
    ):
        if key in name:
            return part
    return "head"

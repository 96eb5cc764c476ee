"""What weights and caches take, before they are there. All in bytes, and exact.

Nothing is evaluated: MLX builds modules lazily, so that shapes and dtypes are known for free. What a
checkpoint's own weights take is in `checkpoints`, what a pass needs on top in `working_space`, and what
fits a machine in `plan`.
"""

import mlx.core as mx
import mlx.nn as nn

from olmo3_mlx.caches.growing import KVCache
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.caches.rotating import RotatingKVCache
from olmo3_mlx.config import FULL, Olmo3Config
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


def cache_bytes(
    config: Olmo3Config, tokens: int, options: CacheOptions | None = None, *, itemsize: int = 2
) -> int:
    """What the caches of `Olmo3.make_caches(options)` take when they hold `tokens`, in one sequence.

    Room to spare and what can be taken back are included. `itemsize` is the bytes of a number where
    keys and values are not quantized, and of a scale where they are (2: bfloat16). Raises OptionError where
    `make_caches` does.
    """
    options = options or CacheOptions()
    heads, head_dim = config.num_key_value_heads, config.head_dim
    position = options.holding(tokens).position_bytes(heads, head_dim, itemsize)
    sliding, full = layer_counts(config)
    rotating = RotatingKVCache(config.sliding_window, options.rewind).room_for(tokens) if sliding else 0
    return position * (sliding * rotating + full * KVCache.room_for(tokens))


def layer_counts(config: Olmo3Config) -> tuple[int, int]:
    """How many layers slide, and how many see everything."""
    full = config.layer_types.count(FULL)
    return config.num_hidden_layers - full, full


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

"""What a model takes before it is loaded, and what the machine has. All in bytes.

Nothing is evaluated: MLX builds the modules lazily, so their shapes and dtypes are exact and free.
"""

import os

import mlx.core as mx
import mlx.nn as nn

from olmo3_mlx.cache import KVCache, RotatingKVCache
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

        def divides(_: str, module: nn.Module) -> bool:
            layer = isinstance(module, nn.Linear | nn.Embedding)
            return layer and module.weight.shape[-1] % group_size == 0

        nn.quantize(model, group_size=group_size, bits=bits, class_predicate=divides)
    return sum(array.nbytes for array in model.tensors().values())


def cache_bytes(config: Olmo3Config, tokens: int, itemsize: int = 2) -> int:
    """Caches that hold `tokens`, one sequence, `itemsize` bytes a value (2: bfloat16), as
    `make_caches` sizes them: the room to spare and what can be taken back included.
    """
    position = 2 * config.num_key_value_heads * config.head_dim * itemsize  # a key and a value
    positions = 0
    for cache in Olmo3(config).make_caches():
        assert isinstance(cache, KVCache | RotatingKVCache)
        positions += cache.room_for(tokens)
    return positions * position


def machine_bytes() -> int:
    """What this machine has for a model: on a Mac the working set that MLX recommends, on a CUDA
    machine the GPU's memory, elsewhere all of RAM.
    """
    info = mx.device_info() if mx.default_device().type == mx.DeviceType.gpu else {}
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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

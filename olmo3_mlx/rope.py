"""Rotary position embedding, plain or YaRN, from a RopeConfig.

RoPE: Su et al. 2021, arXiv:2104.09864, in the half-split form. YaRN: Peng et al. 2023,
arXiv:2309.00071, as Olmo 3 was trained with it (ramp bounds floored and ceiled by `truncate`).
"""

import math

import mlx.core as mx

from olmo3_mlx.config import RopeConfig
from olmo3_mlx.errors import ConfigError


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    """Radians per position of each of the head_dim / 2 rotated pairs, fastest first.

    YaRN divides the slow ones by `factor` (interpolation), keeps the fast ones, and blends those
    that turn between `beta_slow` and `beta_fast` times within the original context.
    """
    half = head_dim // 2
    plain = [rope.theta ** (-i / half) for i in range(half)]
    if rope.rope_type == "default":
        return plain
    if rope.rope_type != "yarn":
        raise ConfigError(f"expected a rope_type of default or yarn, got {rope.rope_type!r}")

    def pair_that_turns(times: float) -> float:
        context = rope.original_max_position_embeddings
        return half * math.log(context / (times * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(half)]
    return [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]


class RotaryEmbedding:
    """Turns queries or keys by their positions.

    YaRN's attention factor is not applied here: the model folds its square into the softmax scale,
    which stays float32, where a bfloat16 factor would shift every full layer's logits by 0.5 %.
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.head_dim = head_dim
        # mx.fast.rope divides the position by these.
        self.periods = mx.array([1.0 / f for f in inverse_frequencies(rope, head_dim)])

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """x [B, heads, L, D], its first position at `offset` -> the same shape and dtype."""
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self.periods,
        )

"""Frequencies of the published models, and rotation against float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from olmo3_mlx import Olmo3Config, RopeConfig
from olmo3_mlx.config import FULL, SLIDING
from olmo3_mlx.published import SIZES
from olmo3_mlx.rope import RotaryEmbedding, inverse_frequencies

THETA = 500000.0


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_the_published_models_keep_18_frequencies_and_interpolate_from_the_35th(size: str) -> None:
    rope = Olmo3Config.from_dict(SIZES[size]).rope
    plain, yarn = inverse_frequencies(rope[SLIDING], 128), inverse_frequencies(rope[FULL], 128)
    ratio = [p / y for p, y in zip(plain, yarn, strict=True)]
    assert plain == pytest.approx([THETA ** (-2 * i / 128) for i in range(64)])
    assert ratio[:19] == pytest.approx([1.0] * 19)
    assert 1 < ratio[19] < ratio[34] < 8
    assert ratio[35:] == pytest.approx([8.0] * 29)


def test_an_untruncated_ramp_begins_and_ends_between_frequencies() -> None:
    rope = RopeConfig(THETA, "yarn", 8.0, 8192, truncate=False)
    low = 64 * math.log(8192 / (32 * 2 * math.pi)) / math.log(THETA)
    high = 64 * math.log(8192 / (2 * math.pi)) / math.log(THETA)
    at = 25
    ramp = (at - low) / (high - low)
    plain = THETA ** (-at / 64)
    assert inverse_frequencies(rope, 128)[at] == pytest.approx(plain / 8 * ramp + plain * (1 - ramp))


@pytest.mark.parametrize("offset", [0, 5, 4095, 65000])
def test_rotation_equals_float64(offset: int) -> None:
    rope = RopeConfig(THETA, "yarn", 8.0, 8192)
    x = np.random.default_rng(0).normal(size=(1, 2, 7, 32)).astype(np.float32)
    angles = (offset + np.arange(7))[:, None] * np.array(inverse_frequencies(rope, 32))
    low, high = x[..., :16].astype(np.float64), x[..., 16:].astype(np.float64)
    expected = np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], -1
    )
    found = np.array(RotaryEmbedding(rope, 32)(mx.array(x), offset))
    # float32 angles: half a unit in the last place of the position, in radians
    assert np.abs(found - expected).max() < 1e-6 + 5 * offset * 2**-24


def test_bfloat16_is_rotated_at_full_precision() -> None:
    """Positions in bfloat16 would be whole steps off from 256 on."""
    embedding = RotaryEmbedding(RopeConfig(THETA), 32)
    x = mx.random.normal((1, 1, 9, 32), key=mx.random.key(0)).astype(mx.bfloat16)
    exact = embedding(x.astype(mx.float32), 4001)
    assert float(mx.abs(embedding(x, 4001).astype(mx.float32) - exact).max()) < 2e-2

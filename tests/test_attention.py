"""Attention in blocks against attention written out in float64; masks; and the memory that blocks save."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from olmo3_mlx.caches import attention as module
from olmo3_mlx.caches.attention import KeysValues, attention, attention_mask, visible

TOLERANCE = 1e-5  # on values of about 1, in float32


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32))


def reference(q: mx.array, k: mx.array, v: mx.array, scale: float, window: int) -> NDArray[np.float64]:
    """One batch, head and query at a time, in float64."""
    queries, keys, values = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    batch, heads, length, _ = queries.shape
    shared, total = keys.shape[1:3]
    out = np.zeros_like(queries)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                here = total - length + i
                seen = slice(max(0, here - window + 1) if window else 0, here + 1)
                kv = h // (heads // shared)
                scores = scale * keys[b, kv, seen] @ queries[b, h, i]
                weights = np.exp(scores - scores.max())
                out[b, h, i] = weights @ values[b, kv, seen] / weights.sum()
    return out


def error(found: mx.array, expected: NDArray[np.float64]) -> float:
    assert found.shape == expected.shape
    return float(np.abs(np.array(found.astype(mx.float32)) - expected).max())


@pytest.mark.parametrize("window", [0, 1, 2, 8, 40, 500])
@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 90), (7, 7), (5, 12), (70, 70), (65, 90)])
def test_attention_is_what_its_definition_says(length: int, total: int, window: int) -> None:
    q, k, v = normal(1, 4, length, 16), normal(1, 2, total, 16, seed=1), normal(1, 2, total, 16, seed=2)
    found = attention(q, k, v, scale=0.7, window=window)
    assert error(found, reference(q, k, v, 0.7, window)) < TOLERANCE


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize("window", [0, 1, 8, 33, 100])
@pytest.mark.parametrize("sizes", [(64, 64), (97, 97), (97, 160), (33, 40), (200, 201)])
def test_blocks_of_queries_change_nothing(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int, sizes: tuple[int, int]
) -> None:
    (asking, shared), (length, total) = heads, sizes
    monkeypatch.setattr(module, "SCORES_BYTES", 1)  # 32 queries a block, the last one ragged
    q = normal(2, asking, length, 16)
    k, v = normal(2, shared, total, 16, seed=1), normal(2, shared, total, 16, seed=2)
    found = attention(q, k, v, scale=0.5, window=window)
    assert error(found, reference(q, k, v, 0.5, window)) < TOLERANCE


def test_blocks_are_as_large_as_their_bytes_allow_and_each_sees_what_its_window_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    real = mx.fast.scaled_dot_product_attention

    def spy(queries: mx.array, keys: mx.array, *rest: mx.array, **options: Any) -> mx.array:
        seen.append((queries.shape[2], keys.shape[2]))
        return real(queries, keys, *rest, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    # An array mask is blocked on every device; 107 keys are in reach of 100 queries.
    monkeypatch.setattr(module, "SCORES_BYTES", 2 * 4 * 107 * 4 * 70)  # 70 queries, rounded down to 64
    q, k = normal(2, 4, 100, 16), normal(2, 2, 300, 16, seed=1)
    attention(q, k, k, scale=1.0, window=8)
    assert seen == [(64, 64 + 7), (36, 36 + 7)]
    seen.clear()
    monkeypatch.setattr(module, "SCORES_BYTES", 2**27)
    attention(q, k, k, scale=1.0, window=8)
    assert seen == [(100, 107)]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_keeps_its_type_and_its_accuracy(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    monkeypatch.setattr(module, "SCORES_BYTES", 1)
    q, k, v = (normal(1, 2, 70, 32, seed=seed).astype(dtype) for seed in range(3))
    found = attention(q, k, v, scale=0.2, window=40)
    assert found.dtype == dtype
    assert error(found, reference(q, k, v, 0.2, 40)) < (2e-2 if dtype == mx.bfloat16 else 3e-3)


def test_keys_and_values_of_a_cache_attend_as_the_function_does() -> None:
    q, k, v = normal(1, 4, 6, 16), normal(1, 2, 20, 16, seed=1), normal(1, 2, 20, 16, seed=2)
    expected = attention(q, k, v, scale=0.3, window=8)
    assert mx.array_equal(KeysValues(k, v).attention(q, scale=0.3, window=8), expected)


def test_queries_need_not_know_of_keys_that_lie_outside_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rotating cache shows a long pass may reach further back than the window."""
    monkeypatch.setattr(module, "SCORES_BYTES", 1)
    q, k, v = normal(1, 2, 50, 16), normal(1, 2, 120, 16, seed=1), normal(1, 2, 120, 16, seed=2)
    outside = 120 - 50 - 7  # the first query sees itself and 7 keys before it
    k[:, :, :outside], v[:, :, :outside] = mx.nan, mx.nan
    found = attention(q, k, v, scale=1.0, window=8)
    assert mx.all(mx.isfinite(found)).item()


@pytest.mark.parametrize("window", [64, 0])
def test_a_long_pass_holds_the_scores_of_one_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(module, "SCORES_BYTES", 1)
    heads, length, dim, rows = 8, 3072, 8, 32
    q, k, v = (normal(1, heads, length, dim, seed=seed) for seed in range(3))
    # A mask for every number of keys would be kept by `visible`, and is not what is measured here.
    for before in range(0, length, rows):
        attention_mask(rows, min(before, window - 1), window)
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(attention(q, k, v, scale=1.0, window=window))
    used = mx.get_peak_memory() - before
    block = heads * rows * ((window + rows) if window else length) * 4
    pieces = 2 * q.nbytes  # the blocks' results, then all of them side by side
    # Scores, weights, masked scores, contiguous keys and values of one block; not of 96.
    assert used < pieces + 8 * block + 2 * k.nbytes * (not window)
    everything = block * length // rows
    assert everything > 2 * (pieces + 8 * block)  # so that the bound above means something


def test_masks_say_who_sees_whom() -> None:
    assert attention_mask(1, 0) is None
    assert attention_mask(1, 500) is None
    assert attention_mask(4, 3) == "causal"
    assert attention_mask(4, 4, window=8) == "causal"
    mask = attention_mask(3, 2, window=3)
    assert isinstance(mask, mx.array)
    expected = [
        [True, True, True, False, False],
        [False, True, True, True, False],
        [False, False, True, True, True],
    ]
    assert np.array(mask).tolist() == expected


@pytest.mark.parametrize("window", [0, 1, 2, 5, 9, 30])
@pytest.mark.parametrize(("length", "before"), [(1, 0), (1, 6), (4, 0), (4, 3), (9, 12)])
def test_what_is_visible_is_oneself_and_what_the_window_reaches(
    length: int, before: int, window: int
) -> None:
    def looks(query: int, key: int) -> bool:
        return key <= query and (not window or query - key < window)

    expected = [[looks(before + q, key) for key in range(before + length)] for q in range(length)]
    assert np.array(visible(length, before, window)).tolist() == expected
    mask = attention_mask(length, before, window)
    if mask is None:
        assert all(map(all, expected))
    elif mask == "causal":
        assert expected == np.tri(length, before + length, before, dtype=bool).tolist()
    else:
        assert np.array(mask).tolist() == expected


def test_a_decoding_step_needs_no_mask_once_its_window_is_full() -> None:
    for before in range(8):
        assert attention_mask(1, before, window=8) is None

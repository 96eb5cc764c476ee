"""Quantized keys and values: what rounding costs, and that attention over them
is attention over the numbers they stand for, which are never all unpacked."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from test_attention import normal, reference

from olmo3_mlx import OptionError
from olmo3_mlx.caches import attention as attention_module
from olmo3_mlx.caches import quantized as module
from olmo3_mlx.caches.attention import attention
from olmo3_mlx.caches.quantized import BITS, KVQuantization, QuantizedKeysValues, _rounded

Floats = NDArray[np.float64]

# Head dimension and group size.
SHAPES = [(32, 32), (64, 64), (64, 32), (128, 128), (128, 64), (256, 128)]


def as_float64(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def unpacked(codes: mx.array, scales: mx.array, bits: int) -> Floats:
    """The numbers that codes and scales stand for, bit by bit and in float64."""
    stream = np.unpackbits(np.array(codes).view(np.uint8), axis=-1, bitorder="little")
    each = stream.reshape(*stream.shape[:-1], -1, bits).astype(np.int64)
    numbers = (each << np.arange(bits)).sum(-1) - 2 ** (bits - 1)
    group = numbers.shape[-1] // scales.shape[-1]
    found: Floats = numbers * np.repeat(as_float64(scales), group, axis=-1)
    return found


def hadamard(dim: int) -> Floats:
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned: Floats = matrix / np.sqrt(dim)
    return turned


def decoded(how: KVQuantization, arrays: list[mx.array]) -> tuple[Floats, Floats]:
    """Keys, turned back, and values."""
    key_bits, value_bits = BITS[how.bits]
    keys = unpacked(arrays[0], arrays[1], key_bits) @ hadamard(how.head_dim)
    return keys, unpacked(arrays[2], arrays[3], value_bits)


def error(found: mx.array, expected: Floats) -> float:
    return float(np.abs(as_float64(found) - expected).max())


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_is_off_by_a_step_at_most_and_by_much_less_on_average(bits: int, group: int) -> None:
    x = normal(2, 3, 50, 256)
    codes, scales = _rounded(x, bits, group)
    assert scales.shape == (2, 3, 50, 256 // group)
    exact = as_float64(x).reshape(2, 3, 50, -1, group)
    found = unpacked(codes, scales, bits).reshape(exact.shape)
    step = np.abs(exact).max(axis=-1, keepdims=True) / 2 ** (bits - 1)
    off = np.abs(found - exact) / step
    assert off.max() < 1.15  # half a step, but for what lies opposite of the largest value
    assert np.sqrt((off**2).mean()) < 0.31  # evenly spread errors: 1 / sqrt(12) = 0.289


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_the_refitted_scale_is_never_worse_than_the_one_it_came_from(bits: int) -> None:
    x = normal(1, 2, 200, 64) ** 3  # with outliers
    exact, half = as_float64(x), 2 ** (bits - 1)
    found = unpacked(*_rounded(x, bits, 64), bits)
    low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
    scale = np.where(high > -low, high, low) / -half
    plain = scale * np.clip(np.round(exact / scale), -half, half - 1)
    ours, theirs = (((y - exact) ** 2).sum(-1) for y in (found, plain))
    assert (ours <= theirs * (1 + 1e-4)).all()
    assert ours.mean() < theirs.mean() * (0.99 if bits < 8 else 1)


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("dim", "group"), SHAPES)
def test_what_is_decoded_is_close_to_what_was_encoded(
    kv_bits: int, dtype: mx.Dtype, dim: int, group: int
) -> None:
    how = KVQuantization(kv_bits, group, dim)
    keys, values = normal(2, 3, 20, dim).astype(dtype), normal(2, 3, 20, dim, seed=1).astype(dtype)
    arrays = how.encode(keys, values)
    assert [array.dtype for array in arrays] == [mx.uint32, dtype, mx.uint32, dtype]
    for bits, found, exact in zip(
        BITS[kv_bits], decoded(how, arrays), map(as_float64, (keys, values)), strict=True
    ):
        relative = np.sqrt(((found - exact) ** 2).sum() / (exact**2).sum())
        # A group's largest value is about 3 times its spread: 3 / 2 ** (bits - 1) / sqrt(12). In bfloat16
        # what the rotation rounds comes on top.
        assert relative < 1.8 / 2**bits + (dtype == mx.bfloat16) * 2**-8, bits
        assert relative > 0.8 / 2**bits, "that is better than so few bits can be"


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_vectors_of_zeros_stay_zeros(kv_bits: int, dtype: mx.Dtype) -> None:
    how = KVQuantization(kv_bits, 64, 64)
    zeros = mx.zeros((1, 2, 5, 64), dtype)
    keys, values = decoded(how, how.encode(zeros, zeros))
    assert (keys == 0).all()
    assert (values == 0).all()


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (mx.float32, 1e30),
        (mx.float32, 1e-30),
        (mx.float32, 1e-41),
        (mx.bfloat16, 1e30),
        (mx.bfloat16, 1e-30),
        (mx.bfloat16, 1e-40),
        (mx.float16, 5e3),
        (mx.float16, 1e-4),
        (mx.float16, 6e-8),
    ],
)
def test_huge_and_tiny_values_keep_their_size(kv_bits: int, dtype: mx.Dtype, size: float) -> None:
    how = KVQuantization(kv_bits, 64, 64)
    x = (mx.clip(normal(1, 2, 9, 64), -2, 2) * size).astype(dtype)
    exact = as_float64(x)
    for found in decoded(how, how.encode(x, x)):
        assert np.isfinite(found).all()
        # What is too small for a scale of its type may be lost, and nothing else.
        smallest = 2.0**-24 if dtype == mx.float16 else 2.0**-126
        assert np.abs(found - exact).max() <= max(0.35 * np.abs(exact).max(), 256 * smallest)


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_one_huge_value_among_tiny_ones_is_no_trouble(kv_bits: int, dtype: mx.Dtype) -> None:
    how = KVQuantization(kv_bits, 64, 64)
    x = normal(1, 1, 4, 64) * 1e-3
    x[..., 17] = mx.array([[[3e4, -3e4, 6e4, -6e4]]])
    x = x.astype(dtype)
    exact = as_float64(x)
    for bits, found in zip(BITS[kv_bits], decoded(how, how.encode(x, x)), strict=True):
        assert np.isfinite(found).all()
        assert np.abs(found - exact).max() <= np.abs(exact).max() * 1.2 / 2 ** (bits - 1)


def test_a_positions_codes_depend_on_that_position_alone() -> None:
    how = KVQuantization(4, 32, 64)
    keys, values = normal(1, 2, 40, 64), normal(1, 2, 40, 64, seed=1)
    whole = how.encode(keys, values)
    for start, stop in ((0, 1), (1, 2), (17, 40)):
        part = how.encode(keys[:, :, start:stop], values[:, :, start:stop])
        for some, all_ in zip(part, whole, strict=True):
            assert mx.array_equal(some, all_[:, :, start:stop])


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize("asked", [(1, 0), (1, 8), (5, 0), (5, 8), (5, 3), (8, 1)])  # length and window
def test_packed_attention_is_unpacked_attention_is_attention_over_the_decoded_numbers(
    monkeypatch: pytest.MonkeyPatch,
    kv_bits: int,
    shape: tuple[int, int],
    heads: tuple[int, int],
    asked: tuple[int, int],
) -> None:
    (dim, group), (asking, shared), (length, window) = shape, heads, asked
    how = KVQuantization(kv_bits, group, dim)
    seen = min(25, window - 1 + length) if window else 25  # as the caches show it
    arrays = how.encode(normal(2, shared, 40, dim), normal(2, shared, 40, dim, seed=1))
    queries = normal(2, asking, length, dim, seed=2)
    span = slice(33 - seen, 33)  # neither from the beginning nor to the end
    scale = dim**-0.5
    keys, values = (mx.array(x[:, :, span].astype(np.float32)) for x in decoded(how, arrays))
    expected = reference(queries, keys, values, scale, window)

    view = QuantizedKeysValues(how, arrays, span.start, span.stop)
    packed = view.attention(queries, scale=scale, window=window)
    monkeypatch.setattr(module, "FEW_QUERIES", 0)
    whole = view.attention(queries, scale=scale, window=window)
    monkeypatch.setattr(module, "UNPACKED_BYTES", 1)  # one head at a time
    by_head = view.attention(queries, scale=scale, window=window)
    for found in (packed, whole, by_head):
        assert found.shape == queries.shape
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 6e-2), (mx.float16, 8e-3)])
@pytest.mark.parametrize("length", [1, 8, 20])
def test_attention_in_half_precision_is_as_good_as_its_numbers(
    kv_bits: int, dtype: mx.Dtype, tolerance: float, length: int
) -> None:
    how = KVQuantization(kv_bits, 128, 128)
    arrays = how.encode(*(normal(1, 2, 60, 128, seed=seed).astype(dtype) for seed in (0, 1)))
    queries = normal(1, 4, length, 128, seed=2).astype(dtype)
    keys, values = (mx.array(x.astype(np.float32)) for x in decoded(how, arrays))
    found = how.attention(queries, arrays, slice(0, 60), scale=128**-0.5, window=0)
    assert found.dtype == dtype
    assert error(found, reference(queries, keys, values, 128**-0.5, 0)) < tolerance


@pytest.mark.parametrize("each", [1, 2, 3, 5])
def test_any_number_of_heads_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    how = KVQuantization(8, 64, 64)
    arrays = how.encode(normal(2, 5, 30, 64), normal(2, 5, 30, 64, seed=1))
    queries = normal(2, 10, 20, 64, seed=2)
    expected = how.attention(queries, arrays, slice(3, 30), scale=0.1, window=0)
    calls: list[int] = []

    def spy(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        calls.append(queries.shape[1])
        return attention(queries, keys, values, **options)

    monkeypatch.setattr(module, "attention", spy)
    monkeypatch.setattr(module, "UNPACKED_BYTES", each * 2 * 2 * 27 * 64 * 4)
    found = how.attention(queries, arrays, slice(3, 30), scale=0.1, window=0)
    assert calls == [2 * min(each, 5 - first) for first in range(0, 5, each)]
    assert float(mx.abs(found - expected).max()) < 1e-6


def test_few_queries_never_unpack_and_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    how = KVQuantization(4, 64, 64)
    arrays = how.encode(normal(1, 1, 30, 64), normal(1, 1, 30, 64, seed=1))
    seen: list[str] = []
    dequantize: Callable[..., mx.array] = mx.dequantize

    def spy(*parts: mx.array, **options: object) -> mx.array:
        seen.append("unpacked")
        return dequantize(*parts, **options)

    monkeypatch.setattr(mx, "dequantize", spy)
    for length in (1, 8):
        how.attention(normal(1, 2, length, 64), arrays, slice(0, 30), scale=1.0, window=0)
    assert not seen
    how.attention(normal(1, 2, 9, 64), arrays, slice(0, 30), scale=1.0, window=0)
    assert seen == ["unpacked"] * 2


@pytest.mark.parametrize("length", [1, 16])
def test_the_whole_cache_is_never_unpacked(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    heads, held, dim = 48, 1024, 128
    how = KVQuantization(4, 128, dim)
    arrays = how.encode(normal(1, heads, held, dim), normal(1, heads, held, dim, seed=1))
    queries = normal(1, heads, length, dim, seed=2)
    one_head = 2 * held * dim * 4
    monkeypatch.setattr(module, "UNPACKED_BYTES", one_head)
    monkeypatch.setattr(attention_module, "SCORES_BYTES", 1)
    mx.eval(arrays, queries)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(how.attention(queries, arrays, slice(0, held), scale=0.1, window=0))
    used = mx.get_peak_memory() - before
    # Two in flight, and a CPU unpacks by way of wider integers.
    assert used < 10 * one_head < heads * one_head / 4


@pytest.mark.parametrize(
    ("kv_bits", "dim", "group", "expected"),
    [
        (4, 128, 128, 4.625),
        (8, 128, 128, 8.125),
        (4, 64, 64, 4.75),
        (8, 64, 64, 8.25),
        (4, 128, 32, 5.0),
        (8, 128, 64, 8.25),
    ],
)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_so_many_bits_a_value_are_really_used(
    kv_bits: int, dim: int, group: int, expected: float, dtype: mx.Dtype
) -> None:
    x = normal(1, 2, 10, dim).astype(dtype)
    arrays = KVQuantization(kv_bits, group, dim).encode(x, x)
    assert sum(array.nbytes for array in arrays) * 8 / (2 * x.size) == expected


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 6, 16, -4])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(OptionError, match=f"kv_bits must be one of 8, 4, not {bits}"):
        KVQuantization(bits, 64, 64)


@pytest.mark.parametrize(("group", "dim"), [(0, 64), (16, 64), (48, 96), (64, 96), (128, 64), (256, 256)])
def test_group_sizes_that_no_kernel_takes_or_that_do_not_fit_are_refused(group: int, dim: int) -> None:
    with pytest.raises(OptionError, match=f"divide the head dimension {dim}, not {group}"):
        KVQuantization(8, group, dim)


def test_what_is_packed_is_not_multiplied_where_mlx_does_it_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: whoever has another GPU than Apple's gets the unpacked way, however few the queries."""
    how = KVQuantization(8, 32, 32)
    view = QuantizedKeysValues(how, how.encode(normal(1, 2, 40, 32), normal(1, 2, 40, 32, seed=1)), 0, 40)
    queries = normal(1, 4, 1, 32, seed=2)
    expected = np.array(view.attention(queries, scale=0.2, window=0), np.float64)

    def wrong(*_: object) -> mx.array:
        raise AssertionError("packed products")

    monkeypatch.setattr(module, "_attention_packed", wrong)
    monkeypatch.setattr("mlx.core.default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: False)
    assert error(view.attention(queries, scale=0.2, window=0), expected) < 1e-5
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    with pytest.raises(AssertionError, match="packed products"):
        view.attention(queries, scale=0.2, window=0)

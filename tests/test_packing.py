"""Codes of few bits are packed as MLX packs and reads them."""

import mlx.core as mx
import numpy as np
import pytest

from olmo3_mlx.packing import packed

BITS = [2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    weight = mx.random.normal((8, 128), key=mx.random.key(bits))
    expected, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    codes = mx.dequantize(expected, mx.ones_like(scales), mx.zeros_like(biases), group_size=64, bits=bits)
    assert mx.array_equal(packed(codes, bits), expected).item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_codes_of_any_shape_are_packed_as_mlx_reads_them(bits: int, dim: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 7, dim))
    codes[0, 0, 0], codes[0, 0, 1] = 2**bits - 1, 0
    found = packed(mx.array(codes.astype(np.float32)), bits)
    assert (found.dtype, found.shape) == (mx.uint32, (2, 3, 7, dim * bits // 32))
    ones = mx.ones((2, 3, 7, dim // 32))
    back = mx.dequantize(found, ones, 0 * ones, group_size=32, bits=bits)
    assert np.array_equal(np.array(back), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_stream_of_bits_has_the_lowest_first(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96))
    stream = np.unpackbits(np.array(packed(mx.array(codes), bits)).view(np.uint8), axis=-1, bitorder="little")
    each = stream.reshape(3, 96, bits).astype(np.int64)
    assert np.array_equal((each << np.arange(bits)).sum(-1), codes)

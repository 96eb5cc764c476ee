"""MLX's kernels on the default device against their definitions: products, attention, norm, RoPE."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isnan

import mlx.core as mx

from olmo3_mlx.caches.attention import attention
from olmo3_mlx.config import RopeConfig
from olmo3_mlx.doctor import exact
from olmo3_mlx.doctor.finding import SKIPPED, Check, Outcome, judged
from olmo3_mlx.doctor.tolerances import (
    ATTENTION,
    LARGE_PRODUCTS,
    NORM,
    PRODUCTS,
    ROPE,
    TYPES,
    Tolerance,
    on_gpu,
)
from olmo3_mlx.rope import RotaryEmbedding, inverse_frequencies

_LARGE = (1024, 2048)  # rows, and inputs and outputs
ROWS = (1, 2, 4, 8, 16, 33)  # MLX changes kernels between them
GROUP_SIZE = 64

_ADVICE = (
    "answers of this machine cannot be trusted: install MLX's own wheel anew (pip install --force-reinstall "
    "mlx), bring the system up to date, and report it with all of this if it stays"
)


def kernel_checks() -> Iterator[Check]:
    """A check for each kernel that Olmo 3 is made of."""
    for bits in (None, 8, 4):
        kind = "matrix products" if bits is None else f"{bits}-bit products"
        yield Check(kind, partial(products, bits), _ADVICE)
    for bits in (None, 4):
        kind = "large matrix products" if bits is None else f"large {bits}-bit products"
        yield Check(kind, partial(large_products, bits), _ADVICE)
    for head_dim in (64, 128):
        yield Check(f"attention, heads of {head_dim}", partial(attentions, head_dim), _ADVICE)
    yield Check("RMSNorm", norms, _ADVICE)
    yield Check("RoPE", rotations, _ADVICE)


class Factor:
    """Weights [N, K] of a type, perhaps quantized: to multiply with, and as numbers."""

    def __init__(self, outputs: int, inputs: int, bits: int | None, dtype: mx.Dtype) -> None:
        weight = normal(2, outputs, inputs) * inputs**-0.5
        self.bits = bits
        if bits is None:
            self.arrays: tuple[mx.array, ...] = (weight.astype(dtype),)
            self.numbers = self.terms = exact.exact(self.arrays[0])
            return
        codes, scales, biases = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits, stream=mx.cpu)
        self.arrays = (codes, scales.astype(dtype), biases.astype(dtype))
        self.numbers = exact.dequantized(*self.arrays, bits)
        self.terms = exact.dequantized(*self.arrays, bits, absolute=True)

    def times(self, x: mx.array) -> mx.array:
        """x [M, K] -> [M, N], as the layers of a model multiply."""
        if self.bits is None:
            return mx.matmul(x, self.arrays[0].T)
        codes, scales, biases = self.arrays
        return mx.quantized_matmul(
            x, codes, scales, biases, transpose=True, group_size=GROUP_SIZE, bits=self.bits
        )


def products(bits: int | None) -> Outcome:
    """Of 1 to 33 rows, [M, 512] x [512, 160]."""

    def errors(dtype: mx.Dtype) -> Iterator[tuple[str, float]]:
        factor, x = Factor(160, 512, bits, dtype), normal(1, max(ROWS), 512).astype(dtype)
        expected, unit = exact.product(x, factor.numbers), exact.magnitude(x, factor.terms)
        for rows in ROWS:
            with mx.stream(mx.cpu):
                wanted, by = expected[:rows], unit[:rows]
            yield f"{rows} rows" if rows > 1 else "1 row", exact.error(factor.times(x[:rows]), wanted, by)

    return _compared(errors, PRODUCTS)


def large_products(bits: int | None) -> Outcome:
    """Of 1,024 rows, [1024, 2048] x [2048, 2048]: smaller ones do not reach all of a GPU's kernels.

    The result times one vector is compared with the factors times it, one after the other (Freivalds 1977).
    """
    if not on_gpu():
        return Outcome(SKIPPED, "for GPUs: a CPU has one kernel for any number of rows")

    def errors(dtype: mx.Dtype) -> Iterator[tuple[str, float]]:
        rows, size = _LARGE
        factor, x = Factor(size, size, bits, dtype), normal(1, rows, size).astype(dtype)
        found, v = factor.times(x), exact.exact(normal(3, 1, size))
        with mx.stream(mx.cpu):
            through = factor.numbers.T
        expected = exact.product(exact.product(v, through), x)
        with mx.stream(mx.cpu):
            unit = mx.sqrt((expected * expected).mean())
        yield f"{rows:,} rows", exact.error(exact.product(v, found), expected, unit)

    return _compared(errors, LARGE_PRODUCTS)


def attentions(head_dim: int) -> Outcome:
    """Of 1, 5 and 33 queries in grouped heads, over 100 keys: all, those before, those in a window."""

    def errors(dtype: mx.Dtype) -> Iterator[tuple[str, float]]:
        for queries, window in ((1, 0), (5, 0), (33, 0), (33, 48)):
            q = normal(1, 1, 4, queries, head_dim).astype(dtype)
            k, v = (normal(seed, 1, 2, 100, head_dim).astype(dtype) for seed in (2, 3))
            found = attention(q, k, v, scale=head_dim**-0.5, window=window)
            expected = exact.attention(_first(q), _first(k), _first(v), head_dim**-0.5, window)
            masked = f"window {window}" if window else "causal" if queries > 1 else "unmasked"
            yield f"{queries} queries, {masked}", exact.error(_first(found), expected, 1.0)

    return _compared(errors, ATTENTION)


def norms() -> Outcome:
    """Of 33 rows of 256 numbers."""

    def errors(dtype: mx.Dtype) -> Iterator[tuple[str, float]]:
        x, weight = 3 * normal(1, 33, 256).astype(dtype), (1 + 0.1 * normal(2, 256)).astype(dtype)
        expected = exact.rms_norm(x, weight, 1e-6)
        with mx.stream(mx.cpu):
            unit = mx.abs(expected)
        yield "33 rows", exact.error(mx.fast.rms_norm(x, weight, 1e-6), expected, unit)

    return _compared(errors, NORM)


def rotations() -> Outcome:
    """Plain and YaRN, of 9 positions from 0, 1,000 and 4,000 on."""
    plain = RopeConfig(theta=500000.0)
    yarn = RopeConfig(500000.0, "yarn", factor=8.0, original_max_position_embeddings=512)

    def errors(dtype: mx.Dtype) -> Iterator[tuple[str, float]]:
        for rope in (plain, yarn):
            for offset in (0, 1000, 4000):
                x = normal(1, 1, 2, 9, 64).astype(dtype)
                expected = exact.rotated(x, inverse_frequencies(rope, 64), offset)
                found = RotaryEmbedding(rope, 64)(x, offset)
                yield f"{rope.rope_type} at {offset:,}", exact.error(found, expected, 1.0)

    return _compared(errors, ROPE)


def normal(seed: int, *shape: int) -> mx.array:
    """The same numbers each time, from a normal distribution."""
    return mx.random.normal(shape, key=mx.random.key(seed), stream=mx.cpu)


def _first(x: mx.array) -> mx.array:
    """A batch's first, taken on the CPU as what it is compared with is."""
    return mx.squeeze(x, 0, stream=mx.cpu)


def _compared(
    errors: Callable[[mx.Dtype], Iterator[tuple[str, float]]],
    tolerance: Tolerance,
    types: Sequence[mx.Dtype] = TYPES,
) -> Outcome:
    """The largest error in each type beside its tolerance; of a failure also where it is beyond."""
    said, wrong = [], False
    for dtype in types:
        name, most, found = str(dtype).rpartition(".")[2], tolerance.of(dtype), list(errors(dtype))
        beyond = [(where, error) for where, error in found if not error <= most]  # what is no number, too
        worst = max((error for _, error in beyond or found), key=lambda error: (isnan(error), error))
        said.append(f"{name} off by {worst:.1e} of at most {most:.1e}")
        if beyond:
            wrong = True
            said[-1] += f" ({'; '.join(where for where, _ in beyond)})"
    return judged(not wrong, ", ".join(said))

"""Definitions in float64 on the CPU, to hold the device's kernels against.

They are products and sums of elements and nothing else: no matrix product, no fused kernel, nothing that
is checked with them, so that no check compares a thing with itself. Slow, and for small arrays.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import mlx.core as mx

_P = ParamSpec("_P")


def _on_cpu(compute: Callable[_P, mx.array]) -> Callable[_P, mx.array]:
    """MLX has float64 on the CPU only."""

    @wraps(compute)
    def computed(*args: _P.args, **keywords: _P.kwargs) -> mx.array:
        with mx.stream(mx.cpu):
            result = compute(*args, **keywords)
            mx.eval(result)
        return result

    return computed


@_on_cpu
def exact(x: mx.array) -> mx.array:
    """The same numbers in float64."""
    return x.astype(mx.float64)


@_on_cpu
def product(x: mx.array, w: mx.array) -> mx.array:
    """x [M, K] times w [N, K] transposed -> [M, N], a row at a time."""
    x, w = x.astype(mx.float64), w.astype(mx.float64)
    return mx.stack([(row[None] * w).sum(axis=-1) for row in x])


@_on_cpu
def magnitude(x: mx.array, w: mx.array) -> mx.array:
    """The same of absolute values: errors of a product are bounded in units of it (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1).
    """
    return product(mx.abs(x), mx.abs(w))


@_on_cpu
def dequantized(
    codes: mx.array, scales: mx.array, biases: mx.array, bits: int, *, absolute: bool = False
) -> mx.array:
    """Weights [N, K] of codes that MLX packed, for `bits` that divide 32; with `absolute` the sum of their
    terms' absolute values, as those may cancel.
    """
    shifts = mx.arange(0, 32, bits).astype(mx.uint32)
    each = ((codes[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    grouped = mx.unflatten(each.astype(mx.float64), -1, (scales.shape[-1], -1))
    s, b = (a.astype(mx.float64)[..., None] for a in (scales, biases))
    return (mx.abs(s) * grouped + mx.abs(b) if absolute else s * grouped + b).flatten(-2)


@_on_cpu
def attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int) -> mx.array:
    """Queries [H, L, D] at the last L of S positions, keys and values [K, S, D] -> [H, L, D].

    A query sees itself and the window - 1 keys before it, or all before it if `window` is 0.
    """
    shared = queries.shape[0] // keys.shape[0]
    q, k, v = (a.astype(mx.float64) for a in (queries, keys, values))
    k, v = (mx.repeat(a, shared, axis=0) for a in (k, v))
    length, positions = q.shape[1], k.shape[1]
    here = mx.arange(positions - length, positions)[:, None]
    there = mx.arange(positions)[None]
    seen = (there <= here) & (there > here - window) if window else there <= here
    scores = (q[:, :, None] * k[:, None]).sum(axis=-1) * mx.array(scale, mx.float64)
    scores = mx.where(seen, scores, mx.array(-1e300, mx.float64))
    weights = mx.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights[..., None] * v[:, None]).sum(axis=2)


@_on_cpu
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [..., D] over the root of the mean of its squares, times weight [D]."""
    x, weight = x.astype(mx.float64), weight.astype(mx.float64)
    squares = (x * x).mean(axis=-1, keepdims=True) + mx.array(eps, mx.float64)
    return weight * x / mx.sqrt(squares)


@_on_cpu
def rotated(x: mx.array, frequencies: list[float], offset: int) -> mx.array:
    """x [..., L, D] with pair (i, i + D / 2) turned by position times frequency i, the first at `offset`."""
    x = x.astype(mx.float64)
    positions = mx.arange(offset, offset + x.shape[-2]).astype(mx.float64)
    angles = positions[:, None] * mx.array(frequencies, mx.float64)
    low, high = mx.split(x, 2, axis=-1)
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def error(found: mx.array, expected: mx.array, unit: mx.array | float) -> float:
    """The largest difference, in units of `unit`; not a number where `found` is none."""
    with mx.stream(mx.cpu):
        by = unit if isinstance(unit, mx.array) else mx.array(unit, mx.float64)
        each = mx.abs(found.astype(mx.float64) - expected) / by
        return float("nan") if mx.isnan(each).any().item() else float(each.max().item())  # type: ignore[arg-type]

"""Attention over what a cache shows, in pieces that bound the working space.

Where MLX has no fused kernel (masks on CUDA, everything on the CPU) it writes the scores of all
queries against all keys; a long prefill then needs more memory for them than for the model. So
queries go some at a time, against the keys that their window reaches. Shapes: B batch, H query heads,
K key-value heads, L queries, S keys, D head dimension.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

SCORES_BYTES = 2**27  # scores that are written at a time

Mask = mx.array | str | None  # as mx.fast.scaled_dot_product_attention takes it


class KeysValues(NamedTuple):
    """Keys and values [B, K, S, D] of the positions that the newest queries may look at."""

    keys: mx.array
    values: mx.array

    def attention(self, queries: mx.array, *, scale: float, window: int) -> mx.array:
        """What `attention` gives for these keys and values."""
        return attention(queries, self.keys, self.values, scale=scale, window=window)


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, window: int) -> mx.array:
    """Queries [B, H, L, D] at the last L of S positions, keys and values [B, K, S, D] -> [B, H, L, D].

    A query sees itself and the window - 1 keys before it; window 0 means all of them.
    """
    length, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    if length == 1 and not 0 < window <= past:  # a decoding step sees all that a cache shows it
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)
    rows = _rows_at_once(queries, keys, window)
    pieces = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        low, high = max(0, past + start + 1 - window) if window else 0, past + stop
        mask = attention_mask(stop - start, past + start - low, window)
        pieces.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:stop],
                keys[:, :, low:high],
                values[:, :, low:high],
                scale=scale,
                mask=mask,
            )
        )
        pace(pieces)
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def pace(results: list[mx.array]) -> None:
    """Start the last of several big results, and wait for the one before it.

    MLX allocates for all that is queued at once: left alone it would hold the temporaries of all of
    them. With one in flight, a GPU still never waits for Python.
    """
    if len(results) > 1:
        mx.async_eval(results[-1])
        mx.eval(results[-2])


def attention_mask(length: int, before: int, window: int = 0) -> Mask:
    """Who sees whom when `length` queries follow `before` keys, each seeing `window` keys at most.

    A query sees itself and the window - 1 keys before it; window 0 means all of them. Returns None
    where every query sees every key, "causal" where order alone decides, else booleans
    [length, before + length], True where a query may look.
    """
    if window and before + length > window:
        return visible(length, before, window)
    return None if length == 1 else "causal"


@lru_cache(maxsize=8)  # the layers of a pass ask for the same one or two
def visible(length: int, before: int, window: int) -> mx.array:
    """Booleans [length, before + length], True where a query may look; see `attention_mask`."""
    query = mx.arange(before, before + length)[:, None]
    key = mx.arange(before + length)[None]
    mask = (key <= query) & (key > query - window) if window else key <= query
    mx.eval(mask)
    return mask


def _rows_at_once(queries: mx.array, keys: mx.array, window: int) -> int:
    """How many queries to take at a time: all of them if their scores are never written."""
    batch, heads, length, _ = queries.shape
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if on_gpu and not (window and keys.shape[2] > window):
        return length
    reach = min(keys.shape[2], window + length - 1) if window else keys.shape[2]
    return max(32, SCORES_BYTES // (batch * heads * reach * queries.itemsize) // 32 * 32)

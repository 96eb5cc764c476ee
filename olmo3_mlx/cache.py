"""Keys and values of tokens already seen, one cache a layer.

A cache knows where a key lies: its position (`offset`), which keys a new query may see (`append`,
`mask`), and how to take the newest ones back (`rewind`). It knows no model. Keys come already
rotated. Shapes: [B, K, S, D] with B batch, K key-value heads, S positions, D head dimension.
"""

from typing import Protocol

import mlx.core as mx

from olmo3_mlx.errors import CacheError

STEP = 256  # positions by which buffers grow, and by which a rotating one fills between compactions

Mask = mx.array | str | None  # as mx.fast.scaled_dot_product_attention takes it


class Cache(Protocol):
    """What the model and the generation loop ask of any cache."""

    offset: int

    @property
    def rewindable(self) -> int:
        """How many of the newest positions can be taken back now."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        ...

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate, none before the first append."""
        ...

    def mask(self, length: int) -> Mask:
        """Who sees whom when `length` positions are appended next: to ask before the append."""
        ...

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add [B, K, L, D]; return the keys and values that the L queries attend to."""
        ...

    def rewind(self, count: int) -> None:
        """Forget the newest `count` positions as if they had never been there."""
        ...


def attention_mask(length: int, before: int, window: int = 0) -> Mask:
    """Who sees whom when `length` queries follow `before` keys, each seeing `window` keys at most.

    A query sees itself and the window - 1 keys before it; window 0 means all of them. Returns None
    where every query sees every key, "causal" where order alone decides, else booleans
    [length, before + length], True where a query may look.
    """
    if window and before + length > window:
        query = mx.arange(before, before + length)[:, None]
        key = mx.arange(before + length)[None]
        return (key <= query) & (key > query - window)
    return None if length == 1 else "causal"


class _Buffer:
    """Keys and values in arrays with room to spare; `length` positions from the start are filled."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    def room(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Put new positions behind the filled ones; there must be room."""
        assert self.keys is not None and self.values is not None
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end

    def view(self, count: int) -> tuple[mx.array, mx.array]:
        """The newest `count` positions."""
        assert self.keys is not None and self.values is not None
        span = slice(self.length - count, self.length)
        return self.keys[:, :, span], self.values[:, :, span]

    def replace(self, keys: mx.array, values: mx.array, room: int) -> None:
        """Hold just these positions, in fresh arrays with place for `room`."""
        self.length = keys.shape[2]
        self.keys, self.values = _padded(keys, room), _padded(values, room)


def _padded(array: mx.array, room: int) -> mx.array:
    # A concatenation copies, so that the result does not keep a longer array alive.
    batch, heads, length, dim = array.shape
    return mx.concatenate([array, mx.zeros((batch, heads, room - length, dim), array.dtype)], axis=2)


def _steps(positions: int) -> int:
    return -(-positions // STEP) * STEP


class _Buffered:
    """What both kinds of cache share: a buffer, and where its end lies in the text."""

    def __init__(self) -> None:
        self._buffer = _Buffer()
        self.offset = 0

    @property
    def rewindable(self) -> int:
        """How many of the newest positions can be taken back now."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold, the room to spare included."""
        return self._buffer.nbytes

    @property
    def state(self) -> list[mx.array]:
        """The buffers, [B, K, S, D] each, S the room and not the number of positions."""
        return self._buffer.state

    def rewind(self, count: int) -> None:
        """Forget the newest `count` positions. Raises CacheError if that is further than it can."""
        if not 0 <= count <= self.rewindable:
            raise CacheError(
                f"cannot take {count} of {self.offset} positions back: {self.rewindable} at most"
            )
        self.offset -= count
        self._buffer.length -= count


class KVCache(_Buffered):
    """All positions, for a full-attention layer. Grows by STEP positions; any number can go back."""

    @property
    def rewindable(self) -> int:
        """All of them."""
        return self.offset

    @staticmethod
    def room_for(positions: int) -> int:
        """Positions that the buffers have place for once they hold this many."""
        return _steps(positions)

    def mask(self, length: int) -> Mask:
        """None for one query, else "causal"."""
        return attention_mask(length, self.offset)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, K, L, D]; return all of them [B, K, offset, D]."""
        buffer = self._buffer
        end = self.offset + keys.shape[2]
        if end > buffer.room():
            if buffer.keys is None:
                buffer.replace(keys[:, :, :0], values[:, :, :0], _steps(end))
            else:
                buffer.replace(*buffer.view(buffer.length), _steps(end))
        buffer.write(keys, values)
        self.offset = end
        return buffer.view(end)


class RotatingKVCache(_Buffered):
    """The newest positions, for a sliding-window layer.

    The buffer is appended to, and compacted to the newest window - 1 + `rewind` positions when it is
    full, so that a decoding step attends to one contiguous view without a mask, and at least `rewind`
    positions can be taken back whatever the number of compactions. Between calls it never holds
    more than `capacity` positions.
    """

    def __init__(self, window: int, rewind: int = 0) -> None:
        """`window` counts the keys that a query sees, itself included."""
        super().__init__()
        self.window = window
        self.kept = window - 1 + rewind
        self.capacity = self.kept + STEP

    @property
    def rewindable(self) -> int:
        """All of them until something was dropped, then those beyond a full window's past."""
        length = self._buffer.length
        return length if length == self.offset else length - (self.window - 1)

    def room_for(self, positions: int) -> int:
        """Positions that the buffers have place for once they hold this many."""
        return min(_steps(positions), self.capacity)

    def mask(self, length: int) -> Mask:
        """None for one query, "causal" while no query's window is full, else booleans."""
        return attention_mask(length, self._past, self.window)

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, K, L, D]; return what the L queries can see [B, K, <= W - 1 + L, D]."""
        buffer, new = self._buffer, keys.shape[2]
        seen = self._past + new
        self.offset += new
        end = buffer.length + new
        if end > self.capacity and self.kept + new > self.capacity:
            return self._append_long(keys, values, seen)
        if end > buffer.room():
            if not buffer.state:
                buffer.replace(keys[:, :, :0], values[:, :, :0], self.room_for(end))
            elif end <= self.capacity:
                buffer.replace(*buffer.view(buffer.length), self.room_for(end))
            else:
                self._compact(*buffer.view(self.kept))
        buffer.write(keys, values)
        return buffer.view(seen)

    @property
    def _past(self) -> int:
        """Positions before the next one that its query can see."""
        return min(self._buffer.length, self.window - 1)

    def _append_long(self, keys: mx.array, values: mx.array, seen: int) -> tuple[mx.array, mx.array]:
        """Attend to more than the buffer will hold, and keep the end of it."""
        buffer = self._buffer
        if buffer.state:
            old_keys, old_values = buffer.view(min(buffer.length, self.kept))
            keys = mx.concatenate([old_keys, keys], axis=2)
            values = mx.concatenate([old_values, values], axis=2)
        total = keys.shape[2]
        kept = min(total, self.kept)
        self._compact(keys[:, :, total - kept :], values[:, :, total - kept :])
        return keys[:, :, total - seen :], values[:, :, total - seen :]

    def _compact(self, keys: mx.array, values: mx.array) -> None:
        """Hold just these, the newest ones."""
        self._buffer.replace(keys, values, self.capacity)
        # Now: left to the end of the pass, all layers would hold their old and new arrays at once.
        mx.eval(self._buffer.state)


def rewind(caches: list[Cache], count: int) -> None:
    """Take the newest `count` positions back in every cache, or in none.

    Raises CacheError, saying how far back is possible, if one of them cannot.
    """
    for cache in sorted(caches, key=lambda cache: cache.rewindable):  # the first to fail comes first
        cache.rewind(count)

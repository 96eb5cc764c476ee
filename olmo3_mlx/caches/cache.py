"""Keys and values of tokens already seen, one cache a layer.

A cache knows where a key lies: its position (`offset`), what a new query may see (`append`), and how
to take the newest positions back (`rewind`). It knows no model. Keys come already rotated by RoPE.
Shapes: [B, K, S, D] with B batch, K key-value heads, S positions, D head dimension.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from olmo3_mlx.caches.attention import KeysValues
from olmo3_mlx.caches.buffer import Buffer
from olmo3_mlx.caches.quantized import KVQuantization, QuantizedKeysValues
from olmo3_mlx.errors import CacheError

STEP = 256  # positions by which a growing cache's buffers grow
SLACK = 128  # positions that a rotating cache takes in between two compactions

View = KeysValues | QuantizedKeysValues


class Cache(Protocol):
    """What the model and the generation loop ask of any cache."""

    @property
    def offset(self) -> int:
        """The position that comes next."""
        ...

    @property
    def rewindable(self) -> int:
        """How many of the newest positions can be taken back now."""
        ...

    @property
    def quantized(self) -> bool:
        """True if what is held is."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        ...

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate, none before the first append."""
        ...

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Add [B, K, L, D]; return the keys and values that the L queries attend to."""
        ...

    def rewind(self, count: int) -> None:
        """Forget the newest `count` positions as if they had never been there."""
        ...


class _Buffered:
    """What both kinds of cache share: a buffer, where its end lies in the text, and the form in which
    it holds keys and values: as they are, or quantized once the text is longer than `start`.
    """

    def __init__(self, quantization: KVQuantization | None, start: int) -> None:
        self._quantization = quantization
        self._start = start
        self._due = False  # to be quantized, for good: what was rounded cannot be had back
        self._buffer = Buffer()

    @property
    def offset(self) -> int:
        """The position that comes next."""
        return self._buffer.first + self._buffer.length

    @property
    def first(self) -> int:
        """The oldest position that is still held."""
        return self._buffer.first

    @property
    def quantized(self) -> bool:
        """True if what is held is."""
        return len(self._buffer.arrays) > 2

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
        """The buffers, [B, K, S, ...] each, S the room and not the number of positions."""
        return self._buffer.arrays

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Add keys and values [B, K, L, D]; return what the L queries can see, those included."""
        how = self._quantization
        if how is None or not (self._due or self.offset + keys.shape[2] > self._start):
            arrays, stop, seen = self._add([keys, values])
            keys, values = (array[:, :, stop - seen : stop] for array in arrays)
            return KeysValues(keys, values)
        self._quantize()
        arrays, stop, seen = self._add(how.encode(keys, values))
        return QuantizedKeysValues(how, arrays, stop - seen, stop)

    def copy(self, start: int, stop: int) -> list[mx.array]:
        """Positions `start` to `stop` as they are held, evaluated, for `extend` to take in again.

        Raises CacheError if they are not all held.
        """
        if not self.first <= start < stop <= self.offset:
            raise CacheError(f"expected positions in {self.first} to {self.offset}, got {start} to {stop}")
        span = slice(start - self.first, stop - self.first)
        # Contiguous, so that a copy does not keep the whole buffer alive.
        parts = [mx.contiguous(array[:, :, span]) for array in self._buffer.arrays]
        mx.eval(parts)
        return parts

    def extend(self, parts: Sequence[mx.array]) -> None:
        """Add positions that `copy` gave, of this cache or of one like it.

        Raises CacheError for those of a cache in another form.
        """
        parts, how = list(parts), self._quantization
        if len(parts) != 2 and (how is None or not how.made(parts)):
            raise CacheError("expected positions of a cache in the same form as this one")
        if how is not None and (self._due or len(parts) != 2):
            self._quantize()
            parts = how.encode(*parts) if len(parts) == 2 else parts
        self._add(parts)

    def rewind(self, count: int) -> None:
        """Forget the newest `count` positions. Raises CacheError if that is further than it can."""
        if not 0 <= count <= self.rewindable:
            raise CacheError(
                f"cannot take {count} of {self.offset} positions back: {self.rewindable} at most"
            )
        self._buffer.length -= count

    def _add(self, parts: list[mx.array]) -> tuple[list[mx.array], int, int]:
        """Store new positions. Returns arrays, where in them the positions end, and how many of those
        the new queries may look at.
        """
        raise NotImplementedError

    def _quantize(self) -> None:
        """Round what is held, and what comes."""
        assert self._quantization is not None
        self._due = True
        buffer = self._buffer
        if self.quantized:
            return
        if not buffer.length:
            buffer.clear(buffer.first)
            return
        buffer.replace(self._quantization.encode(*buffer.newest(buffer.length)), buffer.room)
        mx.eval(buffer.arrays)  # layer by layer, as for a compaction


class KVCache(_Buffered):
    """All positions, for a full-attention layer. Grows by STEP positions; any number can go back."""

    def __init__(self, quantization: KVQuantization | None = None, start: int = 0) -> None:
        """Quantized if `quantization` says how, once there are more than `start` positions."""
        super().__init__(quantization, start)
        self._reserved = 0

    @property
    def rewindable(self) -> int:
        """All of them."""
        return self.offset

    @staticmethod
    def room_for(positions: int) -> int:
        """Positions that the buffers have place for once they hold this many."""
        return _steps(positions)

    def reserve(self, positions: int) -> None:
        """Grow at once, and not step by step, when so many positions are to come."""
        self._reserved = positions

    def _add(self, parts: list[mx.array]) -> tuple[list[mx.array], int, int]:
        buffer = self._buffer
        end = buffer.length + parts[0].shape[2]
        if end > buffer.room:
            old = buffer.newest(buffer.length) if buffer.arrays else [part[:, :, :0] for part in parts]
            buffer.replace(old, _steps(max(end, self._reserved)))
            mx.eval(buffer.arrays)  # layer by layer, as for a compaction
        buffer.write(parts)
        return buffer.arrays, end, end


class RotatingKVCache(_Buffered):
    """The newest positions, for a sliding-window layer.

    The buffer is appended to, and compacted to the newest window - 1 + `rewind` positions when it is
    full, so that a decoding step attends to one contiguous view without a mask, and at least `rewind`
    positions can be taken back whatever the number of compactions. Between calls it never holds
    more than `capacity` positions.
    """

    def __init__(
        self, window: int, rewind: int = 0, quantization: KVQuantization | None = None, start: int = 0
    ) -> None:
        """`window` counts the keys that a query sees, itself included."""
        super().__init__(quantization, start)
        self.window = window
        self.kept = window - 1 + rewind
        self.capacity = self.kept + SLACK

    @property
    def rewindable(self) -> int:
        """All of them until something was dropped, then those beyond a full window's past."""
        length = self._buffer.length
        return length if not self.first else max(0, length - (self.window - 1))

    def room_for(self, positions: int) -> int:
        """Positions that the buffers have place for once they hold this many."""
        return min(_steps(positions), self.capacity)

    def restart(self, position: int) -> None:
        """Hold nothing, and go on at `position`. What follows must first `extend` by the window's past."""
        self._buffer.clear(position)

    def _add(self, parts: list[mx.array]) -> tuple[list[mx.array], int, int]:
        buffer, new = self._buffer, parts[0].shape[2]
        seen = min(buffer.length, self.window - 1) + new
        end = buffer.length + new
        if end > self.capacity and self.kept + new > self.capacity:
            return self._add_long(parts, seen)
        if end > buffer.room:
            if not buffer.arrays:
                buffer.replace([part[:, :, :0] for part in parts], self.room_for(end))
            elif end <= self.capacity:
                buffer.replace(buffer.newest(buffer.length), self.room_for(end))
                mx.eval(buffer.arrays)
            else:
                self._compact(buffer.newest(self.kept), self.offset - self.kept)
        buffer.write(parts)
        return buffer.arrays, buffer.length, seen

    def _add_long(self, parts: list[mx.array], seen: int) -> tuple[list[mx.array], int, int]:
        """Show more than the buffer will hold, and keep the end of it."""
        buffer, offset = self._buffer, self.offset + parts[0].shape[2]
        if buffer.arrays:
            old = buffer.newest(min(buffer.length, self.kept))
            parts = [mx.concatenate([*pair], axis=2) for pair in zip(old, parts, strict=True)]
        total = parts[0].shape[2]
        kept = min(total, self.kept)
        self._compact([part[:, :, total - kept :] for part in parts], offset - kept)
        return parts, total, seen

    def _compact(self, parts: list[mx.array], first: int) -> None:
        """Hold just these, the newest ones, from position `first` on."""
        self._buffer.replace(parts, self.capacity, first)
        # Now: left to the end of the pass, all layers would hold their old and new arrays at once.
        mx.eval(self._buffer.arrays)


def rewind(caches: Sequence[Cache], count: int) -> None:
    """Take the newest `count` positions back in every cache, or in none.

    Raises CacheError, saying how far back is possible, if one of them cannot.
    """
    for cache in sorted(caches, key=lambda cache: cache.rewindable):  # the first to fail comes first
        cache.rewind(count)


def _steps(positions: int) -> int:
    return -(-positions // STEP) * STEP

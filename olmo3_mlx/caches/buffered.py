"""What the kinds of cache have in common: positions in a buffer, as they come or quantized."""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.caches.attention import KeysValues
from olmo3_mlx.caches.buffer import Buffer
from olmo3_mlx.caches.cache import View
from olmo3_mlx.caches.quantized import KVQuantization, QuantizedKeysValues
from olmo3_mlx.errors import CacheError

STEP = 256  # positions by which buffers grow


class BufferedCache:
    """A buffer of positions, where its end lies in the text, and the form in which it holds keys and values:
    as they come, or quantized once the text is longer than `start`.
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
        """True if what is held is quantized."""
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
        quantization = self._quantization
        if quantization is None or not (self._due or self.offset + keys.shape[2] > self._start):
            arrays, stop, seen = self._add([keys, values])
            keys, values = (array[:, :, stop - seen : stop] for array in arrays)
            return KeysValues(keys, values)
        self._quantize()
        arrays, stop, seen = self._add(quantization.encode(keys, values))
        return QuantizedKeysValues(quantization, arrays, stop - seen, stop)

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
        parts, quantization = list(parts), self._quantization
        if len(parts) != 2 and (quantization is None or not quantization.is_encoded(parts)):
            raise CacheError("expected positions of a cache in the same form as this one")
        if quantization is not None and (self._due or len(parts) != 2):
            self._quantize()
            parts = quantization.encode(*parts) if len(parts) == 2 else parts
        self._add(parts)

    def restart(self, position: int) -> None:
        """Hold nothing, and go on at `position`. What follows must first `extend` by what the next query
        sees.
        """
        self._buffer.clear(position)

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


def in_steps(positions: int) -> int:
    """So many positions, rounded up to whole steps."""
    return -(-positions // STEP) * STEP

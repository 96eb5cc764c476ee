"""The cache of a sliding-window layer: it holds the newest positions, and can still go back."""

import mlx.core as mx

from olmo3_mlx.caches.buffered import BufferedCache, in_steps
from olmo3_mlx.caches.quantized import KVQuantization
from olmo3_mlx.config import SLIDING

SLACK = 128  # positions that are taken in between two compactions


class RotatingKVCache(BufferedCache):
    """The newest positions, for a sliding-window layer.

    The buffer is appended to, and compacted to the newest window - 1 + `rewind` positions when it is
    full, so that a decoding step attends to one contiguous view without a mask, and at least `rewind`
    positions can be taken back whatever the number of compactions. Between calls it never holds
    more than `capacity` positions.
    """

    layer_type = SLIDING

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
        return min(in_steps(positions), self.capacity)

    def reserve(self, positions: int) -> None:
        """Do nothing: it never grows beyond its capacity."""

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

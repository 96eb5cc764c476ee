"""The cache of a full-attention layer: it holds every position."""

import mlx.core as mx

from olmo3_mlx.caches.buffered import BufferedCache, in_steps
from olmo3_mlx.caches.quantized import KVQuantization
from olmo3_mlx.config import FULL


class KVCache(BufferedCache):
    """All positions, for a full-attention layer. Grows by STEP positions; any number can go back."""

    layer_type = FULL
    window = 0

    def __init__(self, quantization: KVQuantization | None = None, start: int = 0) -> None:
        """With a `quantization`, it holds codes once there are more than `start` positions."""
        super().__init__(quantization, start)
        self._reserved = 0

    @property
    def rewindable(self) -> int:
        """All of them."""
        return self.offset

    @property
    def kept(self) -> int:
        """All of them."""
        return self.offset

    @property
    def capacity(self) -> int:
        """As many as there are."""
        return self.offset

    @staticmethod
    def room_for(positions: int) -> int:
        """Positions that the buffers have place for once they hold this many."""
        return in_steps(positions)

    def reserve(self, positions: int) -> None:
        """Grow at once, and not step by step, when so many positions are to come; 0 ends that."""
        self._reserved = positions

    def _add(self, parts: list[mx.array]) -> tuple[list[mx.array], int, int]:
        buffer = self._buffer
        end = buffer.length + parts[0].shape[2]
        if end > buffer.room:
            old = buffer.newest(buffer.length) if buffer.arrays else [part[:, :, :0] for part in parts]
            buffer.replace(old, in_steps(max(end, self._reserved)))
            mx.eval(buffer.arrays)  # layer by layer, as for a compaction
        buffer.write(parts)
        return buffer.arrays, end, end

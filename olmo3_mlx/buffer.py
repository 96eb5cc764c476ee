"""Arrays with room to spare, in which a cache keeps its positions."""

import mlx.core as mx


class Buffer:
    """Arrays [B, K, room, ...] of which positions 0 to `length` are filled, in step with each other.

    MLX updates them in place as long as nobody else holds them.
    """

    def __init__(self) -> None:
        self.arrays: list[mx.array] = []
        self.length = 0

    @property
    def room(self) -> int:
        """Positions that the arrays have place for."""
        return self.arrays[0].shape[2] if self.arrays else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the room to spare included."""
        return sum(array.nbytes for array in self.arrays)

    def write(self, parts: list[mx.array]) -> None:
        """Put new positions behind the filled ones; there must be room."""
        end = self.length + parts[0].shape[2]
        for array, part in zip(self.arrays, parts, strict=True):
            array[:, :, self.length : end] = part
        self.length = end

    def newest(self, count: int) -> list[mx.array]:
        """The last `count` positions."""
        return [array[:, :, self.length - count : self.length] for array in self.arrays]

    def replace(self, parts: list[mx.array], room: int) -> None:
        """Hold just these positions, in fresh arrays with place for `room`."""
        self.length = parts[0].shape[2]
        self.arrays = [_padded(part, room) for part in parts]

    def clear(self) -> None:
        """Hold nothing."""
        self.arrays, self.length = [], 0


def _padded(array: mx.array, room: int) -> mx.array:
    # A concatenation copies, so that the result does not keep a longer array alive.
    shape = list(array.shape)
    shape[2] = room - shape[2]
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=2)

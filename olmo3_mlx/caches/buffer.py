"""Arrays with room to spare, in which a cache keeps its positions."""

import mlx.core as mx


class Buffer:
    """Arrays [B, K, room, ...] of which positions 0 to `length` are filled, in step with each other.
    `first` is where the first of them lies in the text.

    MLX updates them in place as long as nobody else holds them. What is held changes in one step, so
    that an interrupt at any moment leaves what was there or what was to be.
    """

    def __init__(self) -> None:
        self._held: tuple[list[mx.array], int, int] = ([], 0, 0)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays, none before the first `replace`."""
        return self._held[0]

    @property
    def length(self) -> int:
        """Positions that are filled; set it to forget the newest."""
        return self._held[1]

    @length.setter
    def length(self, length: int) -> None:
        self._held = (self._held[0], length, self._held[2])

    @property
    def first(self) -> int:
        """Where in the text the first position lies."""
        return self._held[2]

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

    def replace(self, parts: list[mx.array], room: int, first: int | None = None) -> None:
        """Hold just these positions, in fresh arrays with place for `room`."""
        arrays = [_padded(part, room) for part in parts]
        self._held = (arrays, parts[0].shape[2], self.first if first is None else first)

    def clear(self, first: int = 0) -> None:
        """Hold nothing; what comes next lies at `first`."""
        self._held = ([], 0, first)


def _padded(array: mx.array, room: int) -> mx.array:
    # A concatenation copies, so that the result does not keep a longer array alive.
    shape = list(array.shape)
    shape[2] = room - shape[2]
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=2)

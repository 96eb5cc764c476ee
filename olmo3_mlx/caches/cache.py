"""What the model, the loop and a session ask of a cache, whatever its kind.

A cache holds the keys and values of one layer. It knows where a key lies: its position (`offset`), what a
new query may see (`append`), and how to take the newest positions back (`rewind`). It knows no model. Keys
come already rotated by RoPE. Shapes: [B, K, S, D] with B batch, K key-value heads, S positions, D head
dimension.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from olmo3_mlx.caches.attention import KeysValues
from olmo3_mlx.caches.quantized import QuantizedKeysValues

View = KeysValues | QuantizedKeysValues


class Cache(Protocol):
    """One layer's keys and values. All that anybody asks of it is here: a new kind of cache that has these
    and holds an unbroken stretch of positions is decoded with, rewound, kept in snapshots and saved like
    any other.
    """

    @property
    def layer_type(self) -> str:
        """FULL ("full_attention") if it holds every position, SLIDING ("sliding_attention") if it holds the
        newest ones.
        """
        ...

    @property
    def offset(self) -> int:
        """The position that comes next."""
        ...

    @property
    def first(self) -> int:
        """The oldest position that is still held."""
        ...

    @property
    def window(self) -> int:
        """The keys that a query sees, itself included; 0 means all of them."""
        ...

    @property
    def kept(self) -> int:
        """How many of the newest positions stay, however many come; a FULL cache keeps `offset`."""
        ...

    @property
    def capacity(self) -> int:
        """How many positions it can hold between two calls; a FULL cache holds `offset`."""
        ...

    @property
    def rewindable(self) -> int:
        """How many of the newest positions can be taken back now."""
        ...

    @property
    def quantized(self) -> bool:
        """True if what is held is quantized."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold, the room to spare included."""
        ...

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate, none before the first append."""
        ...

    def append(self, keys: mx.array, values: mx.array) -> View:
        """Add keys and values [B, K, L, D]; return those that the L queries attend to."""
        ...

    def rewind(self, count: int) -> None:
        """Forget the newest `count` positions as if they had never been there. Raises CacheError, with
        nothing changed, if that is further than it can.
        """
        ...

    def copy(self, start: int, stop: int) -> list[mx.array]:
        """Positions `start` to `stop` as they are held, evaluated, for `extend` to take in again.

        Raises CacheError if they are not all held.
        """
        ...

    def extend(self, parts: Sequence[mx.array]) -> None:
        """Add positions that `copy` gave, of this cache or of one with the same options.

        Raises CacheError for those of a cache in another form.
        """
        ...

    def reserve(self, positions: int) -> None:
        """Make room for so many positions at once when the next ones come; 0 ends that."""
        ...

    def restart(self, position: int) -> None:
        """Hold nothing, and go on at `position`. What follows must first `extend` by what the next query
        sees.
        """
        ...


def rewind(caches: Sequence[Cache], count: int) -> None:
    """Take the newest `count` positions back in every cache, or in none.

    Raises CacheError, saying how far back is possible, if one of them cannot.
    """
    for cache in sorted(caches, key=lambda cache: cache.rewindable):  # the first to fail comes first
        cache.rewind(count)

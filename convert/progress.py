"""How a long work tells its caller where it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # done, in all: bytes or weights
Stage = Callable[[str], None]  # what begins now, in words

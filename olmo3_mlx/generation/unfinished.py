"""The stream that a reader has begun and may leave unfinished."""

import weakref
from collections.abc import Generator
from inspect import GEN_CLOSED, getgeneratorstate
from typing import TypeVar

_Item = TypeVar("_Item")


class Unfinished:
    """The last stream of several that use one thing in turn. It is held weakly, so that a reader who breaks
    off still closes it at once.
    """

    def __init__(self) -> None:
        self._stream: weakref.ref[Generator[object]] | None = None

    def begin(self, stream: Generator[_Item]) -> Generator[_Item]:
        """Take note of a new stream, and return it."""
        self._stream = weakref.ref(stream)
        return stream

    def __bool__(self) -> bool:
        """True if there is a stream that has not ended."""
        stream = self._stream() if self._stream is not None else None
        return stream is not None and getgeneratorstate(stream) != GEN_CLOSED

    def close(self) -> None:
        """End the stream if it has not ended."""
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.close()

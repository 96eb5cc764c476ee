"""Stretches of conversations with their keys and values, kept so that a session can go back to them.

A conversation is a chain of spans, each the tokens from one snapshot to the next; branches share the
spans before they part, so together they are a tree. What a span's tokens left in the caches is kept for
either layer type by itself: for the FULL layers at all of its positions, for the SLIDING layers perhaps
at its last ones only. The two live and go separately: the snapshot at a span's end can be restored while
the spans before it still have the window's positions of the SLIDING layers.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

from olmo3_mlx.errors import SessionError

Payload = list[list[mx.array]]  # for each layer of one type, what its cache's `copy` gave


class Span:
    """Tokens from position `start` to `stop` of a conversation. Its name says which tokens it and all
    spans before it hold. `sliding_from` is where its positions of SLIDING layers begin, if they were kept.
    """

    def __init__(self, parent: "Span | None", tokens: Sequence[int]) -> None:
        self.parent = parent
        self.tokens = tuple(tokens)
        self.start: int = parent.stop if parent else 0
        self.stop: int = self.start + len(self.tokens)
        before = bytes.fromhex(parent.name) if parent else b""
        self.name: str = hashlib.sha256(before + array("q", self.tokens).tobytes()).hexdigest()[:32]
        self.sliding_from: int | None = None
        self.children: dict[str, Span] = {}

    def child(self, tokens: Sequence[int]) -> "Span":
        """The span with these tokens behind this one, a new one if there was none."""
        span = Span(self, tokens)
        return self.children.setdefault(span.name, span)

    def chain(self) -> list["Span"]:
        """The spans from the beginning to this one; the root, which holds nothing, is left out."""
        spans: list[Span] = []
        span = self
        while span.parent is not None:
            spans.append(span)
            span = span.parent
        return spans[::-1]

    def ids(self) -> list[int]:
        """All tokens up to this span's end."""
        return [token for span in self.chain() for token in span.tokens]

    def branches(self, ids: Sequence[int]) -> Iterator[tuple["Span", int]]:
        """This span and those behind it that `ids` leads to, each with how many ids agree up to its end."""
        waiting = [(self, self.stop)]
        while waiting:
            span, agreed = waiting.pop()
            yield span, agreed
            if agreed == span.stop:
                for child in span.children.values():
                    further = common_length(child.tokens, ids[child.start : child.stop])
                    waiting.append((child, child.start + further))


class Files(Protocol):
    """Where payloads go that memory has no place for."""

    def __contains__(self, key: tuple[str, str]) -> bool: ...

    def read(self, span: Span, layer_type: str) -> Payload:
        """What was written. Raises SessionError if it is not whole."""
        ...

    def write(self, span: Span, layer_type: str, payload: Payload) -> None:
        """Keep it."""
        ...


class SpanStore:
    """Payloads of spans in at most `limit` bytes of memory. The least recently used leave it when others need
    their place: to `files`, or for good.
    """

    def __init__(self, limit: int, files: Files | None = None) -> None:
        self.limit = limit
        self.files = files
        self.nbytes = 0
        self._held: OrderedDict[tuple[str, str], tuple[Span, Payload]] = OrderedDict()

    def has(self, span: Span, layer_type: str) -> bool:
        """True if `get` would find it."""
        key = (span.name, layer_type)
        return key in self._held or (self.files is not None and key in self.files)

    def get(self, span: Span, layer_type: str) -> Payload:
        """What `put` was given for it. Raises SessionError if it is gone, or a file is damaged."""
        held = self.peek(span, layer_type)
        if held is not None:
            return held
        if self.files is None or (span.name, layer_type) not in self.files:
            raise SessionError(f"what the caches held at {span.start} to {span.stop} is gone")
        return self.files.read(span, layer_type)

    def peek(self, span: Span, layer_type: str) -> Payload | None:
        """What memory has of it, which counts as a use."""
        key = (span.name, layer_type)
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][1]

    def put(self, span: Span, layer_type: str, payload: Payload) -> list[Span]:
        """Keep a payload, as the one used last. Returns the spans of which something is gone for good."""
        self.drop(span, layer_type)
        size = payload_bytes(payload)
        gone: list[Span] = []
        while self._held and size <= self.limit < self.nbytes + size:
            (_, oldest_type), (oldest, old) = next(iter(self._held.items()))
            self.drop(oldest, oldest_type)
            gone += self._put_away(oldest, oldest_type, old)
        if size > self.limit:
            return gone + self._put_away(span, layer_type, payload)
        self._held[span.name, layer_type] = (span, payload)
        self.nbytes += size
        return gone

    def drop(self, span: Span, layer_type: str) -> None:
        """Let a payload go from memory."""
        _, payload = self._held.pop((span.name, layer_type), (span, []))
        self.nbytes -= payload_bytes(payload)

    def clear(self) -> None:
        """Let go of everything in memory."""
        self._held.clear()
        self.nbytes = 0

    def _put_away(self, span: Span, layer_type: str, payload: Payload) -> list[Span]:
        if self.files is None:
            return [span]
        try:
            if (span.name, layer_type) not in self.files:
                self.files.write(span, layer_type, payload)
        except SessionError:  # a full disk, say: going back there will cost a run
            return [span]
        return []


def payload_bytes(payload: Payload) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for layer in payload for array in layer)


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many of the first elements are equal."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))

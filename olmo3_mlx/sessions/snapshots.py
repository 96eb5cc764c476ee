"""Snapshots along what a session's caches hold: making them, and going back to one.

A snapshot is the end of a span, see spans.py. Full-attention layers only ever grow, so for those
that lie on the way to where the caches are, only what the sliding layers held is kept.
"""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.config import FULL, SLIDING
from olmo3_mlx.errors import SessionError
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.sessions.spans import Payload, Span, SpanStore, common_length

_GRID = 512  # a long prompt gets snapshots at multiples of this position


class Snapshots:
    """The spans of a conversation and its branches; `path` are those that the caches hold. What they hold of
    each span is kept in `store`, so that the caches can hold it again.
    """

    def __init__(self, store: SpanStore) -> None:
        self.store = store
        self.root = Span(None, ())
        self.path: list[Span] = []
        self._full: list[Cache] = []
        self._sliding: list[Cache] = []

    @property
    def last(self) -> Span:
        """The last span of the path; before the first, the root."""
        return self.path[-1] if self.path else self.root

    @property
    def enabled(self) -> bool:
        """Whether there is a place to keep any."""
        return self.store.limit > 0 or self.store.files is not None

    @property
    def spare(self) -> int:
        """How many tokens the caches can take back, however many came."""
        return min((cache.kept - (cache.window - 1) for cache in self._sliding), default=2**62)

    def clear(self) -> None:
        """Forget all of them."""
        self.store.clear()
        self.root, self.path = Span(None, ()), []

    def follow(self, caches: Sequence[Cache]) -> None:
        """Take snapshots of these caches from now on; they are empty."""
        self._full = [cache for cache in caches if cache.layer_type == FULL]
        self._sliding = [cache for cache in caches if cache.layer_type == SLIDING]
        self.cut(0)

    def cut(self, position: int) -> None:
        """Take note that the caches hold nothing behind `position` any more."""
        left = [span for span in self.path if span.stop > position]
        self.path = self.path[: len(self.path) - len(left)]
        for span in reversed(left):
            self._prune(span)

    def take(self, tokens: Sequence[int], position: int) -> None:
        """Take a snapshot at `position`, if that lies behind the last. `tokens` are what the caches hold."""
        if position <= self.last.stop or not self.enabled:
            return
        span = self.last.child(tokens[self.last.stop : position])
        self.path.append(span)
        self.keep_sliding(span)

    def take_along(self, tokens: Sequence[int], turn: int | None) -> None:
        """Take the snapshots along a long prompt, and one at `turn` if the caches hold it already."""
        begin, end = self.last.stop, len(tokens)
        positions = set(range(begin // _GRID * _GRID + _GRID, end + 1, _GRID))
        for position in sorted(positions | ({turn} if turn is not None and turn <= end else set())):
            self.take(tokens, position)

    def keep_sliding(self, span: Span) -> Payload | None:
        """Keep what the sliding layers hold of a span of the path, and return it; None if that is nothing, or
        was kept before.
        """
        first = max([span.start, *(cache.first for cache in self._sliding)])
        if not self._sliding or first >= span.stop or self._has_sliding(span):
            return None
        if not self.store.files and sum(cache.nbytes for cache in self._sliding) > self.store.limit:
            return None  # a whole window would not stay
        span.sliding_from = first
        payload = [cache.copy(first, span.stop) for cache in self._sliding]
        self._put(span, SLIDING, payload)
        return payload

    def _has_sliding(self, span: Span) -> bool:
        """True if positions of the SLIDING layers are kept of a span. Of a file that an earlier session left,
        it is read where they begin.
        """
        if span.sliding_from is None and self.store.has(span, SLIDING):
            try:
                span.sliding_from = span.stop - self.store.get(span, SLIDING)[0][0].shape[2]
            except (SessionError, IndexError):  # damaged: it is kept anew
                return False
        return self.store.has(span, SLIDING)

    def full_part(self, span: Span) -> Payload:
        """What the full-attention layers hold of a span of the path."""
        return [cache.copy(span.start, span.stop) for cache in self._full]

    def keep_full(self, position: int) -> None:
        """Keep what the full layers hold behind `position`, which the caches are about to leave."""
        for span in self.path:
            if span.stop > position and not self.store.has(span, FULL):
                self._put(span, FULL, self.full_part(span))

    def window(self, span: Span) -> list[Span]:
        """The spans, in order, whose SLIDING positions go without a gap up to the end of `span`, as far
        back as a cache keeps them.
        """
        kept = max((cache.kept for cache in self._sliding), default=0)
        spans: list[Span] = []
        at: Span | None = span
        while at is not None and at.stop > max(0, span.stop - kept):
            if at.sliding_from is None or not self.store.has(at, SLIDING):
                break
            spans.append(at)
            if at.sliding_from > at.start:  # what was before was not held any more
                break
            at = at.parent
        return spans[::-1]

    def nearest(self, wanted: Sequence[int], *, beyond: int = 0) -> tuple[int, Span]:
        """The snapshot from which most of `wanted` can be reached: how much of it the caches would hold once
        that was restored and then rewound to where the two part. If that is not more than `beyond`
        tokens, 0 and the root.
        """
        most, nearest = beyond, self.root
        for span, agreed in self.root.branches(wanted):
            longer = agreed > most or (agreed == most and span.stop < nearest.stop)
            if longer and self._can_reach(span, agreed):
                most, nearest = agreed, span
        return (0, self.root) if nearest is self.root else (most, nearest)

    def _can_reach(self, span: Span, position: int) -> bool:
        """True if the span can be restored, and the caches then rewound to `position`."""
        whole = all(self.store.has(b, FULL) for b in self._new(span))
        return whole and self._past(span) >= span.stop - position

    def restore(self, span: Span) -> list[int]:
        """Make the caches hold the conversation that ends with `span`; returns its tokens.

        Raises SessionError if something of it is damaged; what the caches hold is then undefined.
        """
        new, window = self._new(span), self.window(span)
        # Taken out of memory first: what the caches leave now may need the place.
        full_parts = [(b, self.store.peek(b, FULL)) for b in new]
        sliding_parts = [(b, self.store.peek(b, SLIDING)) for b in window]
        fork = new[0].start if new else span.stop
        self.keep_full(fork)
        self.cut(fork)
        for full in self._full:
            full.rewind(full.offset - fork)
            full.reserve(span.stop)
        for sliding in self._sliding:
            sliding.restart(_begin(window, span))
        self._extend(self._full, FULL, full_parts)
        self._extend(self._sliding, SLIDING, sliding_parts)
        for full in self._full:
            full.reserve(0)
        self.path = span.chain()
        for b in self.path:  # some may have been pruned meanwhile
            assert b.parent is not None
            b.parent.children[b.name] = b
        return span.ids()

    def save(self, files: SessionFiles) -> None:
        """Write all that the caches hold to `files`, so that `resume` can go on from there. The last snapshot
        is where they end.

        Raises SessionError if the disk does not take it; what was saved before is then still whole.
        """
        files.need(self.path, self.path)
        for span in self.path:
            if (span.name, FULL) not in files:
                files.write(span, FULL, self.full_part(span))
            held = self.keep_sliding(span) or self.store.peek(span, SLIDING)
            if held is not None and (span.name, SLIDING) not in files:
                files.write(span, SLIDING, held)
        files.commit(self.path, self.window(self.last))

    def resume(self, files: SessionFiles) -> list[int]:
        """Make the caches hold what `save` wrote to `files`; returns its tokens.

        Raises SessionError, with the reason, if that is not whole or not of this model and form of cache.
        """
        span = self.root
        for tokens, sliding_from in files.chain():
            span = span.child(tokens)
            span.sliding_from = sliding_from
        if not self._can_reach(span, span.stop):
            raise SessionError("files of the conversation's caches are missing")
        restored = self.restore(span)
        files.keep_only(self.path, self.window(span))
        return restored

    def _extend(
        self,
        caches: Sequence[Cache],
        layer_type: str,
        waiting: list[tuple[Span, Payload | None]],
    ) -> None:
        """Add payloads, from files where memory has none, one after the other: none is held twice."""
        while waiting:
            span, payload = waiting.pop(0)
            for cache, parts in zip(caches, self._checked(span, layer_type, payload), strict=True):
                cache.extend(parts)
            mx.eval([cache.state for cache in caches])
            if layer_type == FULL:  # the caches hold it now
                self.store.drop(span, layer_type)

    def _new(self, span: Span) -> list[Span]:
        """The spans up to this one that the caches do not hold."""
        chain = span.chain()
        return chain[common_length(self.path, chain) :]

    def _past(self, span: Span) -> int:
        """How many positions the caches could rewind after this span was restored; less than 0 if they
        would not even see its last token's window.
        """
        window = self.window(span)
        first = _begin(window, span)
        if not self._sliding:
            return span.stop
        if span.stop - first > min(cache.capacity for cache in self._sliding):
            return self.spare  # the older ones will not be kept
        return span.stop - (first and first + max(cache.window - 1 for cache in self._sliding))

    def _checked(self, span: Span, layer_type: str, payload: Payload | None) -> Payload:
        payload = payload or self.store.get(span, layer_type)
        caches = self._full if layer_type == FULL else self._sliding
        first = span.start if layer_type == FULL else span.sliding_from or 0
        if len(payload) != len(caches) or any(
            not parts or any(part.shape[2] != span.stop - first for part in parts) for parts in payload
        ):
            raise SessionError(f"what was kept of positions {first} to {span.stop} is not that")
        return payload

    def _put(self, span: Span, layer_type: str, payload: Payload) -> None:
        for gone in self.store.put(span, layer_type, payload):
            self._prune(gone)

    def _prune(self, span: Span) -> None:
        """Forget a span that nothing is kept of and nothing lies behind; and so on before it."""
        at = span
        while at.parent is not None and not at.children and at not in self.path:
            if self.store.has(at, FULL) or self.store.has(at, SLIDING):
                return
            if at.parent.children.get(at.name) is at:
                del at.parent.children[at.name]
            at = at.parent


def _begin(window: Sequence[Span], span: Span) -> int:
    """The first position of SLIDING layers that the spans `window`, up to the end of `span`, still have."""
    return (window[0].sliding_from or 0) if window else span.stop

"""Checkpoints along what a session's caches hold: making them, and going back to one.

A checkpoint is the end of a block, see blocks.py. Full-attention layers only ever grow, so for those
that lie on the way to where the caches are, only what the sliding layers held is kept.
"""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.caches.cache import Cache, KVCache, RotatingKVCache
from olmo3_mlx.errors import SessionError
from olmo3_mlx.sessions.spans import FULL, SLIDING, Block, BlockStore, Kind, Payload, same

_GRID = 512  # a long prompt gets checkpoints at multiples of this position


class Checkpoints:
    """The blocks of a conversation and its branches. `path` are those that the caches hold."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.root = Block(None, ())
        self.path: list[Block] = []
        self._full: list[KVCache] = []
        self._sliding: list[RotatingKVCache] = []
        self._known = True

    @property
    def last(self) -> Block:
        """The last one on the way."""
        return self.path[-1] if self.path else self.root

    @property
    def kept(self) -> bool:
        """Whether there is a place to keep any, and the caches can give what is to be kept."""
        return self._known and (self.store.limit > 0 or self.store.files is not None)

    @property
    def spare(self) -> int:
        """How far the caches can always go back."""
        return min((cache.kept - (cache.window - 1) for cache in self._sliding), default=2**62)

    def clear(self) -> None:
        """Forget all of them."""
        self.store.clear()
        self.root, self.path = Block(None, ()), []

    def follow(self, caches: Sequence[Cache]) -> None:
        """From now on these caches, empty ones."""
        self._full = [cache for cache in caches if isinstance(cache, KVCache)]
        self._sliding = [cache for cache in caches if isinstance(cache, RotatingKVCache)]
        self._known = len(self._full) + len(self._sliding) == len(caches)
        self.cut(0)

    def cut(self, position: int) -> None:
        """The caches hold nothing behind `position` any more."""
        left = [block for block in self.path if block.stop > position]
        self.path = self.path[: len(self.path) - len(left)]
        for block in reversed(left):
            self._prune(block)

    def mark(self, tokens: Sequence[int], position: int) -> None:
        """Make one there, if it lies behind the last. `tokens` are what the caches hold."""
        if position <= self.last.stop or not self.kept:
            return
        block = self.last.child(tokens[self.last.stop : position])
        self.path.append(block)
        self.capture(block)

    def mark_all(self, tokens: Sequence[int], turn: int | None) -> None:
        """Make those of a long prompt, and one at `turn` if the caches hold it already."""
        begin, end = self.last.stop, len(tokens)
        marks = set(range(begin // _GRID * _GRID + _GRID, end + 1, _GRID))
        for position in sorted(marks | ({turn} if turn is not None and turn <= end else set())):
            self.mark(tokens, position)

    def capture(self, block: Block) -> Payload | None:
        """What the sliding layers hold of a block on the way, which is kept too; None if that is nothing,
        or kept already.
        """
        first = max([block.start, *(cache.first for cache in self._sliding)])
        if not self._sliding or first >= block.stop or self.store.has(block, SLIDING):
            return None
        if not self.store.files and sum(cache.nbytes for cache in self._sliding) > self.store.limit:
            return None  # a whole window would not stay
        block.captured = first
        payload = [cache.copy(first, block.stop) for cache in self._sliding]
        self._put(block, SLIDING, payload)
        return payload

    def full_part(self, block: Block) -> Payload:
        """What the full-attention layers hold of a block on the way."""
        return [cache.copy(block.start, block.stop) for cache in self._full]

    def retire(self, position: int) -> None:
        """Before the caches leave what lies behind `position`: keep the full layers' part of it."""
        for block in self.path:
            if block.stop > position and not self.store.has(block, FULL):
                self._put(block, FULL, self.full_part(block))

    def window(self, block: Block) -> list[Block]:
        """The blocks, in order, whose SLIDING positions go without a gap up to the end of `block`, as far
        back as a cache keeps them.
        """
        kept = max((cache.kept for cache in self._sliding), default=0)
        blocks: list[Block] = []
        at: Block | None = block
        while at is not None and at.stop > max(0, block.stop - kept):
            if at.captured is None or not self.store.has(at, SLIDING):
                break
            blocks.append(at)
            if at.captured > at.start:  # what was before was not held any more
                break
            at = at.parent
        return blocks[::-1]

    def nearest(self, wanted: Sequence[int]) -> list[tuple[int, Block]]:
        """How much of `wanted` the caches would hold after a checkpoint was restored and then rewound to
        where the two part, for all with which that is possible; the most comes first.
        """
        found = []
        for block, agreed in self.root.branches(wanted):
            back = block.stop - agreed
            if self._past(block) >= back and all(self.store.has(b, FULL) for b in self._new(block)):
                found.append((agreed, block))
        return sorted(found, key=lambda pair: (-pair[0], pair[1].stop))

    def restore(self, block: Block) -> list[int]:
        """Make the caches hold the conversation that ends with `block`; returns its tokens.

        Raises SessionError if something of it is damaged; what the caches hold is then undefined.
        """
        new, window = self._new(block), self.window(block)
        # What memory has of it, as what the caches leave now may need its place there.
        full_parts = [(b, self.store.peek(b, FULL)) for b in new]
        sliding_parts = [(b, self.store.peek(b, SLIDING)) for b in window]
        fork = new[0].start if new else block.stop
        self.retire(fork)
        self.cut(fork)
        for full in self._full:
            full.rewind(full.offset - fork)
            full.reserve(block.stop)
        for sliding in self._sliding:
            sliding.restart((window[0].captured or 0) if window else block.stop)
        self._extend(self._full, FULL, full_parts)
        self._extend(self._sliding, SLIDING, sliding_parts)
        for full in self._full:
            full.reserve(0)
        self.path = block.chain()
        for b in self.path:  # some may have been let go meanwhile
            assert b.parent is not None
            b.parent.children[b.name] = b
        return block.ids()

    def _extend(
        self,
        caches: Sequence[KVCache | RotatingKVCache],
        kind: Kind,
        waiting: list[tuple[Block, Payload | None]],
    ) -> None:
        """Add payloads, from files where memory has none, one after the other: none is held twice."""
        while waiting:
            block, payload = waiting.pop(0)
            for cache, parts in zip(caches, self._checked(block, kind, payload), strict=True):
                cache.extend(parts)
            mx.eval([cache.state for cache in caches])
            if kind == FULL:  # the caches hold it now
                self.store.drop(block, kind)

    def _new(self, block: Block) -> list[Block]:
        """The blocks up to this one that the caches do not hold."""
        chain = block.chain()
        return chain[same(self.path, chain) :]

    def _past(self, block: Block) -> int:
        """How many positions the caches could rewind after this block was restored; less than 0 if they
        would not even see its last token's window.
        """
        window = self.window(block)
        first = (window[0].captured or 0) if window else block.stop
        if not self._sliding:
            return block.stop
        if block.stop - first > min(cache.capacity for cache in self._sliding):
            return self.spare  # the older ones will not be kept
        return block.stop - (first and first + max(cache.window - 1 for cache in self._sliding))

    def _checked(self, block: Block, kind: Kind, payload: Payload | None) -> Payload:
        payload = payload or self.store.get(block, kind)
        caches = self._full if kind == FULL else self._sliding
        first = block.start if kind == FULL else block.captured or 0
        if len(payload) != len(caches) or any(
            not parts or any(part.shape[2] != block.stop - first for part in parts) for parts in payload
        ):
            raise SessionError(f"what was kept of positions {first} to {block.stop} is not that")
        return payload

    def _put(self, block: Block, kind: Kind, payload: Payload) -> None:
        for gone in self.store.put(block, kind, payload):
            self._prune(gone)

    def _prune(self, block: Block) -> None:
        """Forget a block that nothing is kept of and nothing lies behind; and so on before it."""
        at = block
        while at.parent is not None and not at.children and at not in self.path:
            if self.store.has(at, FULL) or self.store.has(at, SLIDING):
                return
            if at.parent.children.get(at.name) is at:
                del at.parent.children[at.name]
            at = at.parent

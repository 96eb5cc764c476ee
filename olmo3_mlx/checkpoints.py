"""Checkpoints along what a session's caches hold: making them, and going back to one.

A checkpoint is the end of a block, see blocks.py. Full-attention layers only ever grow, so for those
that lie on the way to where the caches are, only what the sliding layers held is kept.
"""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.blocks import FULL, SLIDING, Block, BlockStore, Payload
from olmo3_mlx.cache import Cache, KVCache, RotatingKVCache

_GRID = 512  # a long prompt gets checkpoints at multiples of this position


class Checkpoints:
    """The blocks of a conversation and its branches. `path` are those that the caches hold."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.root = Block(None, ())
        self.path: list[Block] = []
        self._full: list[KVCache] = []
        self._sliding: list[RotatingKVCache] = []

    @property
    def last(self) -> Block:
        """The last one on the way."""
        return self.path[-1] if self.path else self.root

    def clear(self) -> None:
        """Forget all of them."""
        self.store.clear()
        self.root, self.path = Block(None, ()), []

    def follow(self, caches: Sequence[Cache]) -> None:
        """From now on these caches, empty ones."""
        self._full = [cache for cache in caches if isinstance(cache, KVCache)]
        self._sliding = [cache for cache in caches if isinstance(cache, RotatingKVCache)]
        self.path = []

    def cut(self, position: int) -> None:
        """The caches hold nothing behind `position` any more."""
        self.path = [block for block in self.path if block.stop <= position]

    def mark(self, tokens: Sequence[int], position: int) -> None:
        """Make one there, if it lies behind the last. `tokens` are what the caches hold."""
        if position <= self.last.stop or not (self.store.limit or self.store.files):
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

    def capture(self, block: Block) -> bool:
        """Keep what the sliding layers hold of a block on the way; False if there is nothing to keep."""
        if self.store.has(block, SLIDING):
            return True
        first = max([block.start, *(cache.first for cache in self._sliding)])
        if not self._sliding or first >= block.stop:
            return False
        if not self.store.files and sum(cache.nbytes for cache in self._sliding) > self.store.limit:
            return False  # a whole window would not stay
        block.captured = first
        self.store.put(block, SLIDING, [cache.copy(first, block.stop) for cache in self._sliding])
        return self.store.has(block, SLIDING)

    def retire(self, position: int) -> None:
        """Before the caches leave what lies behind `position`: keep the full layers' part of it."""
        for block in self.path:
            if block.stop > position and not self.store.has(block, FULL):
                self.store.put(block, FULL, self.full_part(block))

    def full_part(self, block: Block) -> Payload:
        """What the full-attention layers hold of a block on the way."""
        return [cache.copy(block.start, block.stop) for cache in self._full]

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

    def restorable(self, block: Block) -> bool:
        """True if all that `restore` needs is there."""
        chain, window = block.chain(), self.window(block)
        new = chain[same(self.path, chain) :]
        first = block.stop if not window else window[0].captured or 0
        past = max((cache.window - 1 for cache in self._sliding), default=0)
        return first <= max(0, block.stop - past) and all(self.store.has(b, FULL) for b in new if self._full)

    def restore(self, block: Block) -> list[int]:
        """Make the caches hold the conversation that ends with `block`; returns its tokens.

        Raises SessionError if a file is damaged; what the caches hold is then undefined.
        """
        chain, window = block.chain(), self.window(block)
        shared = same(self.path, chain)
        fork = chain[shared - 1].stop if shared else 0
        self.retire(fork)
        for full in self._full:
            full.rewind(full.offset - fork)
            full.reserve(block.stop)
        for new in chain[shared:] if self._full else []:
            for full, parts in zip(self._full, self.store.get(new, FULL), strict=True):
                full.extend(parts)
            mx.eval([full.state for full in self._full])  # else all blocks would be in memory twice
        for full in self._full:
            full.reserve(0)
        for sliding in self._sliding:
            sliding.restart((window[0].captured or 0) if window else block.stop)
        for new in window:
            for sliding, parts in zip(self._sliding, self.store.get(new, SLIDING), strict=True):
                sliding.extend(parts)
        mx.eval([sliding.state for sliding in self._sliding])
        self.path = chain
        return [token for b in chain for token in b.tokens]


def same(a: Sequence[object], b: Sequence[object]) -> int:
    """How many of the first elements are equal."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))

"""Checkpoints along what a session's caches hold: making them, and going back to one.

A checkpoint is the end of a block, see blocks.py. Full-attention layers only ever grow, so for those
that lie on the way to where the caches are, only what the sliding layers held is kept.
"""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.blocks import FULL, SLIDING, Block, BlockStore, Kind, Payload, same
from olmo3_mlx.cache import Cache, KVCache, RotatingKVCache
from olmo3_mlx.errors import SessionError

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

    @property
    def kept(self) -> bool:
        """Whether there is a place to keep any."""
        return self.store.limit > 0 or self.store.files is not None

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

        Raises SessionError, with the caches as they were, if something of it is gone or damaged.
        """
        window, new = self.window(block), self._new(block)
        # All of it before anything changes; from files only what is looked at is read yet.
        sliding_parts = [self._payload(b, SLIDING) for b in window]
        full_parts = [self._payload(b, FULL) for b in new]
        fork = new[0].start if new else block.stop
        self.retire(fork)
        for full in self._full:
            full.rewind(full.offset - fork)
            full.reserve(block.stop)
        for payload in full_parts:
            for full, parts in zip(self._full, payload, strict=True):
                full.extend(parts)
            mx.eval([full.state for full in self._full])  # else all blocks would be in memory twice
        for full in self._full:
            full.reserve(0)
        for sliding in self._sliding:
            sliding.restart((window[0].captured or 0) if window else block.stop)
        for payload in sliding_parts:
            for sliding, parts in zip(self._sliding, payload, strict=True):
                sliding.extend(parts)
        mx.eval([sliding.state for sliding in self._sliding])
        self.cut(fork)
        self.path = block.chain()
        for b in new:  # the caches hold it now
            self.store.drop(b, FULL)
        return block.ids()

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
        if not self._sliding or not first:
            return block.stop
        return block.stop - first - max(cache.window - 1 for cache in self._sliding)

    def _payload(self, block: Block, kind: Kind) -> Payload:
        payload = self.store.get(block, kind)
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
            at.parent.children.pop(at.name, None)
            at = at.parent

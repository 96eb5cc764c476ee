"""Stretches of conversations with their keys and values, kept so that a session can go back to them.

A conversation is a chain of blocks, each the tokens from one checkpoint to the next; branches share
the blocks before they part, so together they are a tree. What a block's tokens left in the caches
has two kinds: FULL, of the full-attention layers, for all of its positions, and SLIDING, of the
sliding-window layers, perhaps for its last ones only. The two live and go separately: the checkpoint
at a block's end can be restored while the blocks behind it still have the window's SLIDING positions.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import mlx.core as mx

from olmo3_mlx.errors import SessionError

Kind = Literal["full", "sliding"]
FULL: Kind = "full"
SLIDING: Kind = "sliding"

Payload = list[list[mx.array]]  # for each layer of the kind, what its cache's `copy` gave


class Block:
    """Tokens from position `start` to `stop` of a conversation. Its name says which tokens it and all
    blocks before it hold. `captured` is where its SLIDING positions begin, if they were ever kept.
    """

    def __init__(self, parent: "Block | None", tokens: Sequence[int]) -> None:
        self.parent = parent
        self.tokens = tuple(tokens)
        self.start: int = parent.stop if parent else 0
        self.stop: int = self.start + len(self.tokens)
        before = bytes.fromhex(parent.name) if parent else b""
        self.name: str = hashlib.sha256(before + array("q", self.tokens).tobytes()).hexdigest()[:32]
        self.captured: int | None = None
        self.children: dict[str, Block] = {}

    def child(self, tokens: Sequence[int]) -> "Block":
        """The block with these tokens behind this one; made if it is not there."""
        block = Block(self, tokens)
        return self.children.setdefault(block.name, block)

    def chain(self) -> list["Block"]:
        """The blocks from the beginning to this one; the root, which holds nothing, is left out."""
        blocks: list[Block] = []
        block = self
        while block.parent is not None:
            blocks.append(block)
            block = block.parent
        return blocks[::-1]

    def ids(self) -> list[int]:
        """All tokens up to this block's end."""
        return [token for block in self.chain() for token in block.tokens]

    def branches(self, ids: Sequence[int]) -> Iterator[tuple["Block", int]]:
        """This block and those behind it that `ids` leads to, each with how many ids agree up to its end."""
        waiting = [(self, self.stop)]
        while waiting:
            block, agreed = waiting.pop()
            yield block, agreed
            if agreed == block.stop:
                waiting += [
                    (b, b.start + same(b.tokens, ids[b.start : b.stop])) for b in block.children.values()
                ]


class Files(Protocol):
    """Where payloads go that memory has no place for."""

    def __contains__(self, key: tuple[str, Kind]) -> bool: ...

    def read(self, block: Block, kind: Kind) -> Payload:
        """What was written. Raises SessionError if it is not whole."""
        ...

    def write(self, block: Block, kind: Kind, payload: Payload) -> None:
        """Keep it."""
        ...


class BlockStore:
    """Payloads of blocks, the least recently used of which leave memory when others need their place in
    `limit` bytes: to `files`, or for good.
    """

    def __init__(self, limit: int, files: Files | None = None) -> None:
        self.limit = limit
        self.files = files
        self.nbytes = 0
        self._held: OrderedDict[tuple[str, Kind], tuple[Block, Payload]] = OrderedDict()

    def has(self, block: Block, kind: Kind) -> bool:
        """True if `get` would find it."""
        key = (block.name, kind)
        return key in self._held or (self.files is not None and key in self.files)

    def get(self, block: Block, kind: Kind) -> Payload:
        """What `put` was given for it. Raises SessionError if it is gone, or a file is damaged."""
        held = self.peek(block, kind)
        if held is not None:
            return held
        if self.files is None or (block.name, kind) not in self.files:
            raise SessionError(f"what the caches held at {block.start} to {block.stop} is gone")
        return self.files.read(block, kind)

    def peek(self, block: Block, kind: Kind) -> Payload | None:
        """What memory has of it, which counts as a use."""
        key = (block.name, kind)
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][1]

    def put(self, block: Block, kind: Kind, payload: Payload) -> list[Block]:
        """Keep a payload, as the one used last. Returns the blocks of which something is gone for good."""
        self.drop(block, kind)
        size = payload_bytes(payload)
        gone: list[Block] = []
        while self._held and size <= self.limit < self.nbytes + size:
            (_, oldest_kind), (oldest, old) = next(iter(self._held.items()))
            self.drop(oldest, oldest_kind)
            gone += self._put_away(oldest, oldest_kind, old)
        if size > self.limit:
            return gone + self._put_away(block, kind, payload)
        self._held[block.name, kind] = (block, payload)
        self.nbytes += size
        return gone

    def drop(self, block: Block, kind: Kind) -> None:
        """Let a payload go from memory."""
        _, payload = self._held.pop((block.name, kind), (block, []))
        self.nbytes -= payload_bytes(payload)

    def clear(self) -> None:
        """Let go of everything in memory."""
        self._held.clear()
        self.nbytes = 0

    def _put_away(self, block: Block, kind: Kind, payload: Payload) -> list[Block]:
        if self.files is None:
            return [block]
        try:
            if (block.name, kind) not in self.files:
                self.files.write(block, kind, payload)
        except SessionError:  # a full disk, say: going back there will cost a run
            return [block]
        return []


def payload_bytes(payload: Payload) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for layer in payload for array in layer)


def same(a: Sequence[object], b: Sequence[object]) -> int:
    """How many of the first elements are equal."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))

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

    def matching(self, ids: Sequence[int]) -> Iterator["Block"]:
        """This block's descendants whose conversations `ids` begins with."""
        for child in self.children.values():
            if child.stop <= len(ids) and tuple(ids[child.start : child.stop]) == child.tokens:
                yield child
                yield from child.matching(ids)


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
    """Payloads of blocks, the least recently used of which leave memory when they pass `limit` bytes:
    to `files`, or for good.
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
        """What `put` was given for it. Raises SessionError if a file is damaged, KeyError if it is gone."""
        key = (block.name, kind)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        if self.files is None:
            raise KeyError(key)
        return self.files.read(block, kind)

    def put(self, block: Block, kind: Kind, payload: Payload) -> None:
        """Keep a payload, as the one used last."""
        self.drop(block, kind)
        self._held[block.name, kind] = (block, payload)
        self.nbytes += payload_bytes(payload)
        while self.nbytes > self.limit:
            oldest, kind = next((block, kind) for (_, kind), (block, _) in self._held.items())
            gone = self.drop(oldest, kind)
            if self.files is not None and (oldest.name, kind) not in self.files:
                self.files.write(oldest, kind, gone)

    def drop(self, block: Block, kind: Kind) -> Payload:
        """Let a payload go from memory; returns it, empty if there was none."""
        _, payload = self._held.pop((block.name, kind), (block, []))
        self.nbytes -= payload_bytes(payload)
        return payload

    def clear(self) -> None:
        """Let go of everything in memory."""
        self._held.clear()
        self.nbytes = 0


def payload_bytes(payload: Payload) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for layer in payload for array in layer)

"""A session's keys and values on disk: one safetensors file for each block and kind.

    caches.json                     which blocks the conversation is made of, their tokens
    BLOCK.KIND.CHECKSUM.safetensors one payload, see blocks.py

A file's name holds the block's, which says all tokens up to its end, and a checksum of its content; its
metadata says for which weights and which form of cache it is. A file that is cut short, changed, or
another model's is so refused before anything of it is used. caches.json is replaced last: what it
names is whole.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import mlx.core as mx

from olmo3_mlx.blocks import FULL, SLIDING, Block, Kind, Payload
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import SessionError

FORMAT = "1"
DISK_BYTES = 16 * 2**30  # of a session's files, unless told

_INDEX = "caches.json"


class SessionFiles:
    """The files in `folder`, which is made when the first one is written. They belong to the weights
    `identity` in the cache form `form`, see identity.py.

    Beyond `limit` bytes the least recently used go, but never those of the last `commit`.
    """

    def __init__(self, folder: Path, identity: str, form: str, limit: int = DISK_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._meta = {"format": FORMAT, "identity": identity, "form": form}
        self._files: OrderedDict[tuple[str, Kind], Path] = OrderedDict()  # the one used last at the end
        self._needed: set[tuple[str, Kind]] = set()
        with suppress(OSError):
            paths = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
            for path in paths:
                name, kind, *_ = path.name.split(".")
                if kind in (FULL, SLIDING):
                    self._files[name, FULL if kind == FULL else SLIDING] = path

    def __contains__(self, key: tuple[str, Kind]) -> bool:
        """True if there is a file for a block's name and kind."""
        return key in self._files

    def read(self, block: Block, kind: Kind) -> Payload:
        """What was written. Raises SessionError, with the reason, if it is not that."""
        key = (block.name, kind)
        path = self._files[key]
        self._files.move_to_end(key)
        try:
            path.touch()
            if _checksum(path) != path.name.split(".")[2]:
                raise SessionError(f"{path.name} is cut short or was changed")
            arrays, meta = cast(
                tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True)
            )
        except (OSError, RuntimeError, ValueError) as error:
            self._files.pop(key)
            raise SessionError(f"{path.name} cannot be read: {error}") from None
        except SessionError:
            self._files.pop(key)
            raise
        self._check(path.name, meta)
        payload: Payload = []
        for name in sorted(arrays, key=lambda name: [int(part) for part in name.split(".")]):
            layer = int(name.split(".")[0])
            payload += [[] for _ in range(layer + 1 - len(payload))]
            payload[layer].append(arrays[name])
        return payload

    def write(self, block: Block, kind: Kind, payload: Payload) -> None:
        """Keep a payload. Raises SessionError if the disk does not take it; nothing is left then."""
        arrays = {f"{i}.{j}": part for i, layer in enumerate(payload) for j, part in enumerate(layer)}
        waiting = self.folder / f"{block.name}.{kind}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(waiting, lambda new: mx.save_safetensors(str(new), arrays, metadata=self._meta))
            path = self.folder / f"{block.name}.{kind}.{_checksum(waiting)}.safetensors"
            waiting.rename(path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                waiting.unlink()
            raise SessionError(f"cannot write to {self.folder}: {error}") from None
        self._files[block.name, kind] = path
        self._make_room()

    def commit(self, path: Sequence[Block], window: Sequence[Block]) -> None:
        """Say that the conversation is made of the blocks `path`, at whose end the sliding window is
        that of the blocks `window`. Raises SessionError as `write` does.
        """
        index = {
            **self._meta,
            "blocks": [{"tokens": block.tokens, "captured": block.captured} for block in path],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / _INDEX, lambda new: _write_json(new, index))
        except OSError as error:
            raise SessionError(f"cannot write to {self.folder}: {error}") from None
        self._need(path, window)

    def chain(self) -> list[tuple[list[int], int | None]]:
        """The tokens of the conversation's blocks in order, and where their SLIDING positions begin;
        empty if nothing was saved. Raises SessionError, with the reason, if it is not for this model
        and form, or damaged.
        """
        path = self.folder / _INDEX
        if not path.exists():
            return []
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self._check(_INDEX, index)
            return [
                ([int(token) for token in block["tokens"]], block["captured"]) for block in index["blocks"]
            ]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SessionError(f"{_INDEX} is damaged: {error}") from None

    def keep_only(self, path: Sequence[Block], window: Sequence[Block]) -> None:
        """Remove the files of other branches, whose tokens nobody knows any more."""
        self._need(path, window)
        for key in [key for key in self._files if key not in self._needed]:
            self._remove(key)

    def clear(self) -> None:
        """Remove all files."""
        with suppress(OSError):
            (self.folder / _INDEX).unlink(missing_ok=True)
        for key in list(self._files):
            self._remove(key)
        self._needed.clear()

    def _need(self, path: Sequence[Block], window: Sequence[Block]) -> None:
        self._needed = {(b.name, FULL) for b in path} | {(b.name, SLIDING) for b in window}
        self._make_room()

    def _check(self, name: str, meta: dict[str, str]) -> None:
        for key, what in (("format", "format version"), ("identity", "model"), ("form", "form of cache")):
            if meta.get(key) != self._meta[key]:
                raise SessionError(
                    f"{name} is of another {what}: expected {self._meta[key]}, found {meta.get(key)}"
                )

    def _make_room(self) -> None:
        sizes = {key: path.stat().st_size for key, path in self._files.items() if path.exists()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= self.limit:
                break
            if key not in self._needed:
                self._remove(key)
                total -= size

    def _remove(self, key: tuple[str, Kind]) -> None:
        with suppress(OSError):
            self._files.pop(key).unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")

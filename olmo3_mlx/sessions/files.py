"""A session's keys and values on disk: one safetensors file for each span and type of layer.

    caches.json                            which spans the conversation is made of, and their tokens
    SPAN.TYPE.OWNER.CHECKSUM.safetensors   one payload, see spans.py; TYPE is full or sliding

A file's name holds the span's name, which says all tokens up to its end, a hash of its owner (weights, form
of cache, format version) and a checksum of its content; its metadata says the same. A file that is cut
short, changed, or another model's is so refused before anything of it is used. caches.json is replaced
last: what it names is whole.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.config import FULL, SLIDING
from olmo3_mlx.durable import remove_unfinished, replace_file
from olmo3_mlx.errors import OtherCachesError, SessionError, Setting
from olmo3_mlx.sessions.spans import Payload, Span

FORMAT = "1"  # it calls a span block, a layer type kind, a fingerprint identity, `sliding_from` captured
DISK_BYTES = 16 * 2**30  # of a session's files, unless told

_INDEX = "caches.json"
_LAYER_TYPES = {"full": FULL, "sliding": SLIDING}  # by their names on disk


class SessionFiles:
    """The files in `folder`, which appears with the first of them. They belong to a model by its
    `fingerprint`, and to caches by their `form`, see CacheOptions.form.

    Beyond `limit` bytes the least recently used go, but never those that the conversation needs.
    """

    def __init__(self, folder: Path, fingerprint: str, form: str, limit: int = DISK_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._meta = {"format": FORMAT, "identity": fingerprint, "form": form}
        self._files: OrderedDict[tuple[str, str], Path] = OrderedDict()  # the one used last at the end
        self._owner = hashlib.sha256(json.dumps(self._meta).encode()).hexdigest()[:8]
        self._others: list[Path] = []  # of another model, form or format
        remove_unfinished(folder)
        with suppress(OSError):
            for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime):
                name, kind, *rest = path.name.split(".")
                if kind in _LAYER_TYPES and len(rest) == 3 and rest[0] == self._owner:
                    self._files[name, _LAYER_TYPES[kind]] = path
                elif kind in _LAYER_TYPES:
                    self._others.append(path)
        self._needed = set(self._files)  # until it is known better

    def __contains__(self, key: tuple[str, str]) -> bool:
        """True if there is a file for a span's name and a type of layer."""
        return key in self._files

    def read(self, span: Span, layer_type: str) -> Payload:
        """What was written. Raises SessionError, with the reason, if it is not that."""
        path = self._files[span.name, layer_type]
        self._files.move_to_end((span.name, layer_type))
        try:
            path.touch()
            if _checksum(path) != path.name.split(".")[3]:
                raise SessionError(f"{path.name} is cut short or was changed")
            arrays, meta = cast(
                tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True)
            )
            self._check(path.name, meta)
            if (meta.get("block"), meta.get("kind")) != (span.name, _kind(layer_type)):
                raise SessionError(f"{path.name} holds other tokens than its name says")
            layers = sorted((tuple(int(n) for n in name.split(".")), part) for name, part in arrays.items())
        except (OSError, RuntimeError, ValueError) as error:
            self._files.pop((span.name, layer_type))
            raise SessionError(f"{path.name} cannot be read: {error}") from None
        except SessionError:
            self._files.pop((span.name, layer_type))
            raise
        payload: Payload = [[] for _ in {layer for (layer, _), _ in layers}]
        for (layer, _), part in layers:
            payload[layer].append(part)
        return payload

    def write(self, span: Span, layer_type: str, payload: Payload) -> None:
        """Keep a payload. Raises SessionError if the disk does not take it; nothing is left then."""
        arrays = {f"{i}.{j}": part for i, layer in enumerate(payload) for j, part in enumerate(layer)}
        meta = {**self._meta, "block": span.name, "kind": _kind(layer_type)}
        name = f"{span.name}.{_kind(layer_type)}.{self._owner}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[span.name, layer_type] = replace_file(
                self.folder / f"{name}.safetensors",
                lambda new: mx.save_safetensors(str(new), arrays, metadata=meta),
                rename=lambda new: self.folder / f"{name}.{_checksum(new)}.safetensors",
            )
        except (OSError, RuntimeError) as error:
            raise SessionError(f"cannot write to {self.folder}: {error}") from None
        self._make_room()

    def need(self, path: Sequence[Span], window: Sequence[Span]) -> None:
        """Keep the files of these spans, whatever they take, besides those of the last `commit`."""
        self._needed |= _keys(path, window)

    def commit(self, path: Sequence[Span], window: Sequence[Span]) -> None:
        """Say that the conversation is made of the spans `path`, at whose end the sliding window is
        that of the spans `window`. Raises SessionError as `write` does.
        """
        index = {
            **self._meta,
            "blocks": [{"tokens": span.tokens, "captured": span.sliding_from} for span in path],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(
                self.folder / _INDEX, lambda new: new.write_text(json.dumps(index), encoding="utf-8")
            )
        except OSError as error:
            raise SessionError(f"cannot write to {self.folder}: {error}") from None
        self._needed = _keys(path, window)
        self._remove_others()
        self._make_room()

    def chain(self) -> list[tuple[list[int], int | None]]:
        """The tokens of the conversation's spans in order, and where their positions of SLIDING layers begin;
        empty if nothing was saved. Raises SessionError, with the reason, if it is not for this model
        and form, or damaged.
        """
        path = self.folder / _INDEX
        try:
            if not path.exists():
                return []
            index = json.loads(path.read_text(encoding="utf-8"))
            self._check(_INDEX, index)
            return [_span(entry) for entry in index["blocks"]]
        except OSError as error:
            raise SessionError(f"{_INDEX} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SessionError(f"{_INDEX} is damaged: {error}") from None

    def keep_only(self, path: Sequence[Span], window: Sequence[Span]) -> None:
        """Remove the files of other branches, whose tokens nobody knows any more."""
        self._needed = _keys(path, window)
        for key in [key for key in self._files if key not in self._needed]:
            self._remove(key)
        self._remove_others()

    def clear(self) -> None:
        """Remove all files."""
        with suppress(OSError):
            (self.folder / _INDEX).unlink(missing_ok=True)
        for key in list(self._files):
            self._remove(key)
        self._remove_others()
        self._needed.clear()

    def _remove_others(self) -> None:
        for path in self._others:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._others.clear()

    def _check(self, name: str, meta: dict[str, str]) -> None:
        """Raise OtherCachesError unless a file's `meta` says that it is of this model and form."""
        others = [key for key in self._meta if meta.get(key) != self._meta[key]]
        if "format" in others:
            raise OtherCachesError(
                ["format"],
                f"{name} is of another format version: expected {FORMAT}, found {meta.get('format')}",
            )
        if others:
            differing = {"identity": "model", "form": "form"}
            parts: list[str | Setting] = [f"{name} was kept "]
            if "form" in others:
                parts += [
                    *_held(str(meta.get("form")), self._meta["form"]),
                    ", and " if len(others) > 1 else "",
                ]
            parts += ["by another model"] if "identity" in others else []
            raise OtherCachesError([differing[key] for key in others], *parts)

    def _make_room(self) -> None:
        sizes = {key: path.stat().st_size for key, path in self._files.items() if path.exists()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= self.limit:
                break
            if key not in self._needed:
                self._remove(key)
                total -= size

    def _remove(self, key: tuple[str, str]) -> None:
        with suppress(OSError):
            self._files.pop(key).unlink(missing_ok=True)


def _held(found: str, wanted: str) -> tuple[str | Setting, ...]:
    """In which form caches were kept, and in which they are wanted."""
    was, now = CacheOptions.of_form(found), CacheOptions.of_form(wanted)
    if was is None or now is None or was == now:
        return (f"in another form of cache, {found!r} and not {wanted!r}",)
    return (*was.told_from(now), ", not ", *now.told_from(was))


def _kind(layer_type: str) -> str:
    return layer_type.removesuffix("_attention")


def _keys(path: Sequence[Span], window: Sequence[Span]) -> set[tuple[str, str]]:
    return {(b.name, FULL) for b in path} | {(b.name, SLIDING) for b in window}


def _span(entry: dict[str, Any]) -> tuple[list[int], int | None]:
    """A span of the index. Raises ValueError, or what a wrong type leads to, if it is none."""
    tokens, sliding_from = entry["tokens"], entry["captured"]
    if not tokens or any(type(token) is not int or not 0 <= token < 2**31 for token in tokens):
        raise ValueError("expected a list of token ids")
    if sliding_from is not None and (type(sliding_from) is not int or sliding_from < 0):
        raise ValueError("expected a position")
    return tokens, sliding_from


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]

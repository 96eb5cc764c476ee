"""One tensor in a torch.save archive that lies somewhere in a file: found, checked, not read.

The archive is a zip without compression: `<any>/data.pkl` describes the tensor, `<any>/data/<key>` is its
storage, `<any>/byteorder` says how its numbers lie. Source: torch/serialization.py.
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

from convert.reading.native.unpickle import Call, Global, Persistent, UnpickleError, unpickle
from olmo3_mlx.checkpoints.headers import FORMATS

_STORAGES = {"torch.FloatStorage": "F32", "torch.BFloat16Storage": "BF16", "torch.HalfStorage": "F16"}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = frozenset({*_STORAGES, _REBUILD, _PARAMETER, "collections.OrderedDict"})
_PICKLE_BYTES = 2**16
_AXES = 8  # more than any weight has; with `numbers` it keeps what errors print short


class ArchiveError(ValueError):
    """An archive that does not hold the tensor expected. Says what it holds."""


def tensor_in(file: Path, begin: int, length: int, shape: tuple[int, ...], format: str) -> int:
    """Find where in `file` the elements of a tensor begin whose archive is at `begin`, `length` bytes long.

    Raises ArchiveError unless it is a contiguous tensor of that shape and format, OSError.
    """
    with file.open("rb") as stream:
        window = _Window(stream, begin, length)
        entries = _entries(window)
        root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
        if root is None:
            raise ArchiveError("holds no data.pkl")
        order = entries.get(f"{root}byteorder")
        if order is not None and window.bytes(*order) != b"little":
            raise ArchiveError("is not in little-endian order")
        at, size = entries[f"{root}data.pkl"]
        if size > _PICKLE_BYTES:
            raise ArchiveError(f"has a data.pkl of {size:,} bytes, expected that of one tensor")
        try:
            described = unpickle(window.bytes(at, size), _ALLOWED, _PICKLE_BYTES)
            key, skipped = _described(described, shape, format)
        except UnpickleError as error:
            raise ArchiveError(f"has a data.pkl that {error}") from None
        except (TypeError, ValueError, IndexError, KeyError) as error:
            reason = error if isinstance(error, ArchiveError) else "has a data.pkl that describes no tensor"
            raise ArchiveError(str(reason)) from None
        at, size = entries.get(f"{root}data/{key}", (0, 0))
        each = FORMATS[format].size
        if size < (skipped + math.prod(shape)) * each:
            raise ArchiveError("is cut short")
        return begin + at + skipped * each


def numbers(value: Any) -> tuple[int, ...]:
    """Check sizes or offsets out of a pickle. Raises TypeError for anything else."""
    if type(value) is not tuple or len(value) > _AXES:
        raise TypeError
    if not all(type(n) is int and 0 <= n < 2**48 for n in value):
        raise TypeError
    return value


def _described(value: Any, shape: tuple[int, ...], format: str) -> tuple[str, int]:
    """The storage's key and how many of its elements come first."""
    if type(value) is Call and value.name == _PARAMETER:
        value = value.args[0]
    if type(value) is not Call or value.name != _REBUILD or type(value.args[0]) is not Persistent:
        raise TypeError
    storage, skipped, sizes, strides = value.args[:4]
    kind, of, key = storage.id[:3]
    if kind != "storage" or type(of) is not Global or type(key) is not str or type(skipped) is not int:
        raise TypeError
    sizes = numbers(sizes)
    if _STORAGES.get(of.name) != format or sizes != shape or skipped < 0:
        raise ArchiveError(f"holds {of.name} {list(sizes)}, .metadata says {format} {list(shape)}")
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise ArchiveError("holds a tensor that is not contiguous")
        expected *= size
    return key, skipped


def _entries(window: "_Window") -> dict[str, tuple[int, int]]:
    """Find where in the archive each entry's bytes begin, and how many there are."""
    try:
        with zipfile.ZipFile(window) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise ArchiveError(f"is no torch.save archive ({error})") from None
    entries = {}
    for info in listed:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ArchiveError("is compressed or encrypted, which torch.save never does")
        header = window.bytes(info.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ArchiveError("is damaged")
        name, extra = struct.unpack_from("<HH", header, 26)
        at = info.header_offset + 30 + name + extra
        if at + info.file_size > window.length:
            raise ArchiveError("is cut short")
        if info.filename in entries:
            raise ArchiveError(f"has {info.filename[:80]!r} twice")
        entries[info.filename] = (at, info.file_size)
    return entries


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, begin: int, length: int) -> None:
        self.stream, self.begin, self.length = stream, begin, length
        self.at = 0

    def bytes(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on, fewer where it ends."""
        self.stream.seek(self.begin + at)
        return self.stream.read(max(0, min(count, self.length - at)))

    def readable(self) -> bool:
        """Say yes: it can be."""
        return True

    def seekable(self) -> bool:
        """Say yes: it can be."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset from its begin, from here or from its end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError(22, "Invalid argument")
        self.at = start + offset
        return self.at

    def tell(self) -> int:
        """The position."""
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Read as much as there is into a buffer."""
        data = self.bytes(self.at, len(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

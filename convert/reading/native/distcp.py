"""PyTorch's distributed checkpoints, read piece by piece without PyTorch.

A folder holds `.metadata`, a pickle that says which chunks make each tensor and where they lie, and files
of chunks, each an ordinary torch.save archive: a zip whose data.pkl describes a tensor and whose data/0
is its bytes. Both pickles go through `convert.reading.native.unpickle`, which runs nothing.

Sources: torch/distributed/checkpoint/metadata.py, OLMo-core's distributed/checkpoint/filesystem.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.reading.native.archive import ArchiveError, numbers, tensor_in
from convert.reading.native.unpickle import Call, Global, UnpickleError, unpickle
from convert.reading.stored import evaluated, numpy_dtype, rows_in
from olmo3_mlx.checkpoints.headers import Formatted
from olmo3_mlx.errors import CheckpointError

METADATA = ".metadata"
_METADATA_BYTES = 2**28
_CELLS = 2**22  # of the grid in which a tensor's chunks are checked
_FILE = re.compile(r"\w[\w.-]{0,200}\.distcp")
_NAME = re.compile(r"[\w.-]{1,200}")  # of a tensor; errors print it
_FORMATS = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}

_DCP = "torch.distributed.checkpoint.metadata"
_INDEX = f"{_DCP}.MetadataIndex"
_STORAGE = ("olmo_core.distributed.checkpoint.filesystem._StorageInfo",
            "torch.distributed.checkpoint.filesystem._StorageInfo")  # fmt: skip
_ALLOWED = frozenset({
    f"{_DCP}.Metadata", f"{_DCP}.TensorStorageMetadata", f"{_DCP}.ChunkStorageMetadata", _INDEX,
    f"{_DCP}.BytesStorageMetadata", f"{_DCP}.TensorProperties", f"{_DCP}._MEM_FORMAT_ENCODING",
    f"{_DCP}.StorageMeta", "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    *_STORAGE, "torch.Size", "torch.serialization._get_layout", "collections.OrderedDict",
    "pathlib.PosixPath", "pathlib._local.PosixPath",
    *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16",
                                   "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2")),
})  # fmt: skip


@dataclass(eq=False)
class Chunk:
    """A part of a tensor, from `offsets` on, of shape `sizes`: an archive `begin` to `begin + length`."""

    file: Path
    begin: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    format: str

    @cached_property
    def _data(self) -> int:
        """The place of its first element in the file."""
        try:
            return tensor_in(self.file, self.begin, self.length, self.sizes, self.format)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read ({error.strerror}), fetch it again") from None
        except ArchiveError as error:
            raise CheckpointError(f"{self.file}: the chunk at {self.begin} {error}: fetch it again") from None

    def rows(self, start: int, stop: int) -> "np.ndarray[Any, Any]":
        """Read rows of the chunk, as they are stored."""
        return rows_in(self.file, self._data, self.sizes, self.format, start=start, stop=stop)


@dataclass(frozen=True)
class Chunked(Formatted):
    """A tensor in chunks that may split any of its axes (a `convert.reading.stored.Tensor`)."""

    shape: tuple[int, ...]
    format: str
    chunks: tuple[Chunk, ...]

    def rows(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop` of the first axis. Raises CheckpointError for damaged files."""
        whole = np.empty((stop - start, *self.shape[1:]), numpy_dtype(self.format))
        for chunk in self.chunks:
            begin = chunk.offsets[0]
            first, last = max(start, begin), min(stop, begin + chunk.sizes[0])
            if first < last:
                rest = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
                place = (slice(first - start, last - start), *(slice(o, o + s) for o, s in rest))
                whole[place] = chunk.rows(first - begin, last - begin)
        return evaluated(whole, self.format)


def chunked_tensors(folder: Path, prefix: str) -> dict[str, Chunked]:
    """The tensors in a distributed checkpoint whose names begin with `prefix`, by the rest of the name.

    Reads .metadata only. Raises CheckpointError for one that is missing or damaged, that names what it
    should not, or whose chunks do not make whole tensors out of files that are there.
    """
    file = folder / METADATA
    try:
        tables, places = _read(file, prefix)
        return {name: _tensor(folder, name, table, places.get(name, {})) for name, table in tables.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}), fetch it again") from None
    except UnpickleError as error:
        raise CheckpointError(f"{file}: {error}; it was not written by OLMo-core, or is damaged") from None
    except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged, fetch it again ({type(error).__name__})") from None


def _read(file: Path, prefix: str) -> tuple[dict[str, Any], dict[str, dict[Any, Any]]]:
    """Tables of chunks by name; places in files by name and offsets."""
    if file.stat().st_size > _METADATA_BYTES:
        raise UnpickleError(f"is over {_METADATA_BYTES:,} bytes long")
    state = _state(unpickle(file.read_bytes(), _ALLOWED, _METADATA_BYTES), f"{_DCP}.Metadata")
    tables = {
        _named(name, prefix): _state(table, f"{_DCP}.TensorStorageMetadata")
        for name, table in state["state_dict_metadata"].items()
        if name.startswith(prefix)
    }
    places: dict[str, dict[Any, Any]] = {}
    for key, place in state["storage_data"].items():
        index = _state(key, _INDEX)
        name: str = index["fqn"]
        if not name.startswith(prefix):
            continue
        of_tensor = places.setdefault(_named(name, prefix), {})
        offsets = None if index["offset"] is None else numbers(index["offset"])
        if offsets in of_tensor:
            raise CheckpointError(f"{file}: has {name} at {offsets} twice: fetch it again")
        of_tensor[offsets] = _state(place, *_STORAGE)
    return tables, places


def _named(name: str, prefix: str) -> str:
    """A tensor's name without the prefix."""
    if not _NAME.fullmatch(name):
        raise UnpickleError(f"has a tensor by the name of {name[:80]!r}")
    return name.removeprefix(prefix)


def _state(value: Any, *names: str) -> dict[str, Any]:
    """The attributes that a call would have set; it must be of one of `names`."""
    if type(value) is not Call or value.name not in names or type(value.state) is not dict:
        raise TypeError
    return value.state


def _tensor(folder: Path, name: str, table: Mapping[str, Any], places: Mapping[Any, Any]) -> Chunked:
    shape = numbers(table["size"])
    kept = table["properties"].state
    dtype = kept["dtype"] if type(kept) is dict else kept[0]
    if type(dtype) is not Global or dtype.name not in _FORMATS:
        got = getattr(dtype, "name", "of no known type")
        raise CheckpointError(f"{folder}: {name} is {got}, expected one of {', '.join(_FORMATS)}")
    chunks = []
    for entry in table["chunks"]:
        state = _state(entry, f"{_DCP}.ChunkStorageMetadata")
        offsets, sizes = numbers(state["offsets"]), numbers(state["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape) or not shape:
            raise TypeError
        if math.prod(sizes):  # a rank without a part of a small tensor writes an empty one
            place = places.get(offsets) or (places.get(None) if sizes == shape else None)
            if place is None:
                raise CheckpointError(
                    f"{folder}: {name} lacks its chunk at {list(offsets)}: the checkpoint was not written "
                    f"to its end, take another"
                )
            chunks.append(_chunk(folder, place, offsets, sizes, _FORMATS[dtype.name]))
    _check_whole(folder, name, shape, chunks)
    return Chunked(shape, _FORMATS[dtype.name], tuple(chunks))


def _chunk(
    folder: Path, place: Mapping[str, Any], offsets: tuple[int, ...], sizes: tuple[int, ...], format: str
) -> Chunk:
    file_name = place["relative_path"]
    begin, length = numbers((place["offset"], place["length"]))
    if type(file_name) is not str or not _FILE.fullmatch(file_name):  # nothing outside of the folder
        got = repr(file_name[:80]) if type(file_name) is str else f"a {type(file_name).__name__}"
        raise CheckpointError(f"{folder}: expected names of .distcp files in it, got {got}")
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{folder}: its chunks are compressed or otherwise transformed: save it without"
        )
    file = folder / file_name
    if not file.is_file():
        raise CheckpointError(f"{folder}: expected {file_name}, found none: fetch it")
    if file.stat().st_size < begin + length:
        raise CheckpointError(f"{file}: cut short, fetch it again")
    return Chunk(file, begin, length, offsets, sizes, format)


def _check_whole(folder: Path, name: str, shape: tuple[int, ...], chunks: Iterable[Chunk]) -> None:
    """Raise CheckpointError unless each element of the tensor is in just one chunk."""
    cuts = [sorted({0, n}) for n in shape]
    for axis, n in enumerate(shape):
        inner = {c.offsets[axis] for c in chunks} | {c.offsets[axis] + c.sizes[axis] for c in chunks}
        cuts[axis] = sorted(inner | {0, n})
        if cuts[axis][-1] > n:
            raise CheckpointError(f"{folder}: {name} has chunks outside of its shape {list(shape)}")
    cells = [len(edges) - 1 for edges in cuts]
    if math.prod(cells) > _CELLS:
        raise CheckpointError(f"{folder}: {name} is in too many chunks to be checked")
    grid = np.zeros(cells, np.uint8)
    at = [{edge: i for i, edge in enumerate(edges)} for edges in cuts]
    for chunk in chunks:
        place = tuple(
            slice(at[axis][o], at[axis][o + s])
            for axis, (o, s) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True))
        )
        if grid[place].any():
            raise CheckpointError(f"{folder}: {name} has chunks that overlap: fetch its .metadata again")
        grid[place] = 1
    if not grid.all():
        raise CheckpointError(f"{folder}: {name} has parts that are in no chunk: fetch its .metadata again")

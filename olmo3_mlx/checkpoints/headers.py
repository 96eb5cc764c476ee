"""What the headers of safetensors files say: each tensor's type, shape and place. No data is read."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx

from olmo3_mlx.errors import CheckpointError
from olmo3_mlx.git_lfs import refuse_pointer

# The types that a checkpoint may hold, by their names in safetensors.
FORMATS: Mapping[str, mx.Dtype] = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}

_NAMED_AT_MOST = 20  # tensors in one error message


class Formatted:
    """What a tensor's shape and safetensors' name for its type, `format`, tell of it."""

    shape: tuple[int, ...]
    format: str

    @property
    def dtype(self) -> mx.Dtype:
        """MLX's type for the format."""
        return FORMATS[self.format]

    @property
    def size(self) -> int:
        """Its elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.size * self.dtype.size


@dataclass(frozen=True)
class TensorHeader(Formatted):
    """A tensor in a safetensors file: `offset` is where its bytes begin."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    format: str


def all_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint's safetensors files by name.

    Raises CheckpointError for a file that is missing or damaged, whose tensors are of a type not in FORMATS,
    or that holds what another file holds too.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        found = read_headers(file)
        if twice := sorted(found.keys() & headers.keys()):
            raise CheckpointError(f"{file}: holds tensors that another file holds too: {name_some(twice)}")
        headers |= found
    return headers


def read_headers(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file by name.

    Raises CheckpointError for a file that is damaged, or whose tensors are of another dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than it")
            header = json.loads(stream.read(length).rstrip(b"\0"), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        tensors = {
            name: _header(file, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__" and not is_buffer(name)
        }
        _check_apart(tensors)
        return tensors
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        refuse_pointer(file, CheckpointError)
        raise CheckpointError(f"{file}: damaged or cut short, fetch it again ({error})") from None


def is_buffer(name: str) -> bool:
    """True for what older programs stored though the config says it: RoPE's frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def _header(file: Path, name: str, entry: Any, begin: int, size: int) -> TensorHeader:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a type, shape or offsets that cannot be")
    if dtype not in FORMATS:
        raise CheckpointError(
            f"{file}: {name} is {dtype}, expected one of {', '.join(FORMATS)}: it was not written by MLX or "
            f"for Olmo 3"
        )
    start, stop = (begin + offset for offset in offsets)
    tensor = TensorHeader(file, start, tuple(shape), dtype)
    if stop > size or stop - start != tensor.nbytes:
        raise ValueError(f"{name} does not lie where the header says")
    return tensor


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """True for a list of whole numbers, none below 0."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_apart(tensors: Mapping[str, TensorHeader]) -> None:
    """Raise ValueError if two tensors share bytes."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ValueError(f"{name} lies on another tensor")
        end = tensor.offset + tensor.nbytes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def name_some(names: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")

"""Where each tensor of a result lies: its file and offset, known before anything is computed.

The format is safetensors: eight bytes of length, a header in JSON, the data without gaps. Laid out
beforehand, tensors can be written in pieces and in any order, and a broken run can go on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from convert.quantized import part_names
from olmo3_mlx.checkpoints.files import SINGLE
from olmo3_mlx.checkpoints.headers import FORMATS
from olmo3_mlx.quantization import Quantization

SHARD_BYTES = 5 * 10**9  # a file holds no more, unless the parts of a single weight do

_NAMES = {dtype: name for name, dtype in FORMATS.items()}


@dataclass(frozen=True)
class Spec:
    """The shape and dtype that a tensor of the result will have."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Place:
    """The file that a tensor lies in, and its `offset` from the file's beginning."""

    file: str
    offset: int
    spec: Spec


@dataclass(frozen=True)
class Layout:
    """The files of a result, each with its header, and the place of every tensor in them."""

    headers: Mapping[str, bytes]
    places: Mapping[str, Place]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(place.spec.nbytes for place in self.places.values())

    def size(self, file: str) -> int:
        """The bytes of a file, its header included."""
        mine = (place.spec.nbytes for place in self.places.values() if place.file == file)
        return len(self.headers[file]) + sum(mine)


def part_specs(
    name: str, shape: tuple[int, ...], dtype: mx.Dtype, scheme: Quantization | None
) -> dict[str, Spec]:
    """The tensors that a weight [outputs, inputs] becomes: itself, or codes, scales and, in affine
    mode, biases, as mx.quantize gives them.
    """
    if scheme is None:
        return {name: Spec(shape, dtype)}
    rows, inputs = shape
    groups = (rows, inputs // scheme.group_size)
    specs = [Spec((rows, inputs * scheme.bits // 32), mx.uint32)]
    specs += [Spec(groups, dtype)] * 2 if scheme.mode == "affine" else [Spec(groups, mx.uint8)]
    return dict(zip(part_names(name), specs, strict=False))


def lay_out(weights: Sequence[Mapping[str, Spec]], shard_bytes: int | None = None) -> Layout:
    """Lay out files for the parts of each weight, in the order given; those of one weight stay together."""
    shards = _shards(weights, SHARD_BYTES if shard_bytes is None else shard_bytes)
    headers: dict[str, bytes] = {}
    places: dict[str, Place] = {}
    for number, specs in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # The widest types first, so that all data is aligned.
        ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.size)
        header, offset = {"__metadata__": {"format": "mlx"}}, 0
        offsets: dict[str, int] = {}
        for name, spec in ordered:
            stop = offset + spec.nbytes
            entry = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (offset, stop)}
            header[name] = entry  # type: ignore[assignment]
            offsets[name], offset = offset, stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        begin = len(headers[file])
        places |= {name: Place(file, begin + offsets[name], spec) for name, spec in specs.items()}
    return Layout(headers, places)


def _shards(weights: Sequence[Mapping[str, Spec]], limit: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for specs in weights:
        size = sum(spec.nbytes for spec in specs.values())
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1] |= specs
        filled += size
    return shards

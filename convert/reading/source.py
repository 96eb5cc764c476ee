"""What is converted: a checkpoint's config and its tensors, unquantized whatever their stored form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.quantized import part_names
from convert.reading.native.checkpoint import files_read, is_native, open_native
from convert.reading.remote import Remote, Shard, remote_tensors
from convert.reading.stored import Dequantized, Stored, Tensor, reading
from convert.size import Size
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.files import INDEX, has_weights, small_files
from olmo3_mlx.checkpoints.headers import is_buffer, name_some
from olmo3_mlx.checkpoints.names import is_hub_id, resolve
from olmo3_mlx.checkpoints.weights import check_names_and_shapes, quantize
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import CheckpointError, ConvertError, OptionError, Setting
from olmo3_mlx.fields import read_json
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import Quantization


@dataclass(frozen=True)
class Source:
    """A checkpoint: its folder, config.json as it stands and as it is read, and its tensors, unread yet,
    by their names in an unquantized checkpoint. `stamps` are its files as they were found, `dtype` what
    its tensors are meant to be where that is not what they are stored in, `hub_id` where it came from.
    """

    folder: Path
    data: Mapping[str, Any]
    config: Olmo3Config
    tensors: Mapping[str, Tensor]
    stamps: Mapping[Path, tuple[int, int]]
    dtype: mx.Dtype | None = None
    hub_id: str | None = None

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def size(self) -> Size:
        """The bytes that all tensors take as they are stored."""
        return Size(self.parameters, sum(tensor.nbytes for tensor in self.tensors.values()))

    @property
    def quantized(self) -> dict[str, Quantization]:
        """The schemes of the layers that are stored quantized, by their paths."""
        schemes = {name: t.scheme for name, t in self.tensors.items() if isinstance(t, Dequantized)}
        return {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None, shards: Path | None = None) -> "Source":
        """Find and check it. Of a model on the hub the small files are fetched now, a shard when it is
        needed: to huggingface_hub's cache, or to the folder `shards` and then only until `release`.

        Raises CheckpointError for files that cannot be read, and for tensors that are missing, extra or
        misshapen; OptionError for `shards` of a folder, HubError.
        """
        with reading(name):
            return cls._open(name, revision, shards)

    @classmethod
    def _open(cls, name: str | Path, revision: str | None, shards: Path | None) -> "Source":
        hub_id = str(name) if is_hub_id(name) else None
        if shards is not None and hub_id is None:
            raise OptionError(f"{name} is a folder here: ", Setting("keep", False), " is for hub ids")
        folder = resolve(name, revision, weights=hub_id is None)
        if is_native(folder):
            return cls._native(folder)
        checkpoint = Checkpoint.in_folder(folder)
        config = checkpoint.config
        stored: Mapping[str, Stored | Remote] = (
            _all_stored(checkpoint)
            if hub_id is None or has_weights(folder)
            else remote_tensors(hub_id, folder.name, shards)
        )
        model = Olmo3(config)
        quantize(model, stored, folder)
        check_names_and_shapes(model, stored, folder)
        files = set(small_files(folder).values())
        files |= {tensor.file for tensor in stored.values() if isinstance(tensor, Stored)}
        return cls(
            folder=folder,
            data=read_json(folder / "config.json"),
            config=config,
            tensors=_dequantized(config, stored),
            stamps=_stamps(files),
            # Of a quantized model that of its norms, which never are.
            dtype=None if config.quantization is None else stored["model.norm.weight"].dtype,
            hub_id=hub_id,
        )

    @classmethod
    def _native(cls, folder: Path) -> "Source":
        """As OLMo-core's training wrote it, in float32 mostly."""
        data, tensors = open_native(folder)
        config = Olmo3Config.from_dict(data, str(folder / "config.json"))
        files = set(small_files(folder).values()) | files_read(folder, tensors)
        return cls(folder, data, config, tensors, _stamps(files), dtype=mx.bfloat16)

    def fingerprint(self) -> dict[str, Any]:
        """The facts that tell this checkpoint from another, and from itself after a change, in JSON's types.

        For a model on the hub that is its commit, however many of its files the cache has by now.
        """
        if self.hub_id is not None:
            return {"hub": self.hub_id, "commit": self.folder.name}
        return {"folder": str(self.folder.resolve()), "files": [[f.name, *s] for f, s in self.stamps.items()]}

    def largest_shard(self) -> int:
        """The bytes of the largest file that is on this disk only until `release`."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            for shard, size in _remote_bytes(tensor):
                if shard.folder is not None:
                    sizes[shard.file] = sizes.get(shard.file, 0) + size
        return max(sizes.values(), default=0)

    def release(self, name: str, waiting: Iterable[str]) -> None:
        """Let go of the shards of tensor `name` that none of those `waiting` needs."""
        needed = {shard.file for other in waiting for shard, _ in _remote_bytes(self.tensors[other])}
        for shard, _ in _remote_bytes(self.tensors[name]):
            if shard.file not in needed:
                shard.release()

    def check_unchanged(self) -> None:
        """Raise ConvertError if a file is another than it was when the source was opened."""
        for file, stamp in self.stamps.items():
            with reading(file):
                same = file.is_file() and _stamp(file) == stamp
            if not same:
                raise ConvertError(
                    f"{file} has changed during the conversion: begin again with what it is now"
                )


def _stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    return {file: _stamp(file) for file in sorted(files) if file.is_file()}


def _stamp(file: Path) -> tuple[int, int]:
    """A file's size in bytes and the time of its last change in ns."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _remote_bytes(tensor: Tensor) -> list[tuple[Shard, int]]:
    """The shards on the hub that a tensor lies in, and its bytes there."""
    parts = tensor.parts if isinstance(tensor, Dequantized) else (tensor,)
    return [(part.shard, part.nbytes) for part in parts if isinstance(part, Remote)]


def _all_stored(checkpoint: Checkpoint) -> dict[str, Stored]:
    headers, index = checkpoint.headers, checkpoint.folder / INDEX
    promised = read_json(index)["weight_map"] if index.is_file() else {}
    files = {file.name for file in checkpoint.weight_files}  # an index of an earlier form promises nothing
    lacking = sorted(
        name
        for name, file in promised.items()
        if file in files and name not in headers and not is_buffer(name)
    )
    if lacking:
        raise CheckpointError(f"{index}: promises tensors that no file holds: {name_some(lacking)}")
    return {name: Stored.at(header) for name, header in headers.items()}


def _dequantized(config: Olmo3Config, stored: Mapping[str, Stored | Remote]) -> dict[str, Tensor]:
    """Put codes, scales and biases of each quantized layer under the name of the weight they stand for."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        path, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if f"{path}.scales" not in stored:
            tensors[name] = tensor
            continue
        assert config.quantization is not None
        scheme = config.quantization.of(path)
        assert scheme is not None
        parts = [stored[part] for part in part_names(name) if part in stored]
        tensors[name] = Dequantized(tuple(parts), scheme)
    return tensors

"""Tensors on the hub: a shard is fetched when the first of its tensors is read, and perhaps let go of
after the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from convert.reading.stored import Stored, stored_tensors
from olmo3_mlx.checkpoints.headers import FORMATS, Formatted, is_buffer
from olmo3_mlx.checkpoints.hub import hub_errors
from olmo3_mlx.errors import CheckpointError, HubError


@dataclass
class Shard:
    """A safetensors file of `hub_id` at the commit `revision`: kept in huggingface_hub's cache, or in
    `folder` until `release`.
    """

    hub_id: str
    revision: str
    file: str
    folder: Path | None = None
    _tensors: Mapping[str, Stored] = field(default_factory=dict)

    def tensors(self) -> Mapping[str, Stored]:
        """The tensors that it holds, by name; it is fetched first if need be. Raises HubError."""
        if not self._tensors:
            from huggingface_hub import hf_hub_download  # noqa: PLC0415  (slow to import)

            with hub_errors(self.hub_id, self.revision):
                path = hf_hub_download(self.hub_id, self.file, revision=self.revision, local_dir=self.folder)
            self._tensors = stored_tensors(Path(path))
        return self._tensors

    def release(self) -> None:
        """Remove the file, unless the cache has it, as nothing more of it will be read."""
        if self.folder is not None:
            (self.folder / self.file).unlink(missing_ok=True)
            self._tensors = {}


@dataclass(frozen=True)
class Remote(Formatted):
    """A tensor in a shard whose `format` and shape the hub told."""

    shard: Shard
    name: str
    shape: tuple[int, ...]
    format: str

    def rows(self, start: int, stop: int) -> mx.array:
        """Read rows `start` to `stop` of the first axis; their shard is fetched first if need be.

        Raises HubError, or CheckpointError if the shard does not hold what the hub said.
        """
        stored = self.shard.tensors().get(self.name)
        if stored is None or (stored.shape, stored.format) != (self.shape, self.format):
            raise CheckpointError(f"{self.shard.file}: {self.name} is not what the hub said: fetch it again")
        return stored.rows(start, stop)


def remote_tensors(hub_id: str, revision: str, folder: Path | None) -> dict[str, Remote]:
    """The tensors of a model at a commit by name; only headers are fetched. Shards go to `folder`, or
    to huggingface_hub's cache. Raises HubError.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)

    with hub_errors(hub_id, revision):
        listing = HfApi().get_safetensors_metadata(hub_id, revision=revision)
    tensors: dict[str, Remote] = {}
    for file, metadata in listing.files_metadata.items():
        shard = Shard(hub_id, revision, file, folder)
        for name, info in metadata.tensors.items():
            if is_buffer(name) or (listing.sharded and listing.weight_map.get(name) != file):
                continue
            if info.dtype not in FORMATS:
                raise CheckpointError(
                    f"{hub_id}: {name} is {info.dtype}, expected one of {', '.join(FORMATS)}"
                )
            tensors[name] = Remote(shard, name, tuple(info.shape), info.dtype)
    lacking = sorted(name for name in listing.weight_map if name not in tensors and not is_buffer(name))
    if lacking:
        raise HubError(f"{hub_id}: its index promises tensors that its shards lack: {', '.join(lacking[:5])}")
    return tensors

"""Which files make a checkpoint's folder: the small ones, and the safetensors files that hold its weights."""

import re
from pathlib import Path

from olmo3_mlx.errors import CheckpointError
from olmo3_mlx.fields import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")

# A checkpoint's small files. Of these special_tokens_map.json is for other programs, a licence for people.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX,
    *LICENSES,
)

_WEIGHT_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")


def has_weights(folder: Path) -> bool:
    """True if a checkpoint's weights are all there."""
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the index's order. Raises CheckpointError."""
    index = folder / INDEX
    names = indexed_files(index) if index.is_file() else [SINGLE]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file() and not index.is_file() and any(folder.glob("model-*-of-*.safetensors")):
            raise CheckpointError(f"{folder}: expected {INDEX}, which says what is in its shards, found none")
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: expected {file.name}, found none: the checkpoint is incomplete, or not "
                f"in safetensors form"
            )
    return files


def indexed_files(index: Path) -> list[str]:
    """The names of the safetensors files that an index speaks of. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to files, found none")
    for name in weight_map.values():
        # Nothing outside the folder, and no pattern that would fetch more than the weights.
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            raise CheckpointError(f"{index}: expected file names of safetensors beside it, got {name!r}")
    return sorted(set(weight_map.values()))

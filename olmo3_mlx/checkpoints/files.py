"""Which files make a checkpoint's folder: the small ones, and the safetensors files that hold its weights."""

import re
from pathlib import Path

from olmo3_mlx.errors import CheckpointError
from olmo3_mlx.fields import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")

# A checkpoint's small files: those that say what the model is and does, and those that nothing here needs.
NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    INDEX,
)
BESIDES = ("special_tokens_map.json", "adapter_config.json", *LICENSES)

SHARDS = "model-*-of-*.safetensors"  # of a checkpoint without an index

_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
# Files of an adapter, PEFT's and mlx-lm's.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
_WEIGHT_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")


def small_files(folder: Path) -> dict[str, Path]:
    """A checkpoint's small files, by their names in it."""
    found = [path for pattern in (*NEEDED, *BESIDES) for path in sorted(folder.glob(pattern))]
    return {str(path.relative_to(folder)): path for path in found if path.is_file()}


def check_whole_model(folder: Path) -> None:
    """Raise CheckpointError for a folder without config.json, and for an adapter to a model."""
    has_config = (folder / "config.json").is_file()
    adapters = [name for name in _ADAPTERS if (folder / name).is_file()]
    if adapters and not (has_config and has_weights(folder)):
        data = read_json(folder / adapters[0]) if adapters[0].endswith(".json") else {}
        base = data.get("base_model_name_or_path") or data.get("model")
        raise CheckpointError(
            f"{folder}: is a LoRA adapter{f' for {base}' if base else ''}, not a whole model: merge it into "
            f"its model first, with `mlx_lm.fuse` or PEFT's merge_and_unload, and take the result"
        )
    if not has_config:
        raise CheckpointError(f"{folder}: expected a checkpoint's folder, found no config.json in it")


def has_weights(folder: Path) -> bool:
    """True if a checkpoint's weights are all there."""
    return bool(weight_files_if_whole(folder))


def weight_files_if_whole(folder: Path) -> list[Path]:
    """The same as `weight_files`; none if they are not all there."""
    try:
        return weight_files(folder)
    except CheckpointError:
        return []


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, in that order; one file; or shards
    that are all there, whose names say so.

    Raises CheckpointError if files are missing, and for two sets of weights of which either could be meant.
    """
    index, single = folder / INDEX, folder / SINGLE
    indexed = [folder / name for name in indexed_files(index)] if index.is_file() else []
    missing = [file for file in indexed if not file.is_file()]
    if indexed and not missing and single.is_file() and single not in indexed:
        raise CheckpointError(
            f"{folder}: has {SINGLE} and beside it the files that {INDEX} names: remove those that do not "
            f"belong to this model"
        )
    if indexed and not missing:
        return indexed
    if single.is_file():  # beside an index of an earlier form, perhaps
        return [single]
    if missing:
        raise CheckpointError(
            f"{folder}: expected {missing[0].name}, found none: the checkpoint is incomplete, or not in "
            f"safetensors form"
        )
    return _shards(folder)


def _shards(folder: Path) -> list[Path]:
    """Shards without an index."""
    shards = {path.name: path for path in sorted(folder.glob(SHARDS))}
    counts = {match[1] for name in shards if (match := _SHARD.fullmatch(name))}
    if len(counts) == 1:
        count = int(counts.pop())
        expected = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if set(expected) == set(shards):
            return list(shards.values())
        if missing := sorted(set(expected) - set(shards)):
            raise CheckpointError(
                f"{folder}: expected {', '.join(missing[:3])} too: the checkpoint is incomplete"
            )
    if shards:
        raise CheckpointError(f"{folder}: expected {INDEX}, which says what is in its shards, found none")
    raise CheckpointError(
        f"{folder}: expected {SINGLE}, found none: the checkpoint is incomplete, or not in safetensors form"
    )


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

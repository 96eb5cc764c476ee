"""Writing a checkpoint so that its name only ever stands for a complete one."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.quantize import Recipe
from olmo3_mlx.config import FULL, SLIDING, RopeConfig
from olmo3_mlx.durable import flush
from olmo3_mlx.errors import ConvertError
from olmo3_mlx.hub import INDEX, SINGLE, TEXT_FILES

SHARD_BYTES = 2 * 10**9  # a file holds no more, unless a single tensor does

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A hidden folder beside `dest` that becomes `dest` when the block ends, and vanishes if it fails.

    Raises ConvertError if `dest` exists, or if the disk does not take what is written.
    """
    dest = dest.expanduser().absolute()
    made = [parent for parent in dest.parents if not parent.exists()]
    if os.path.lexists(dest):
        raise ConvertError(f"{dest} exists already: choose another destination, or remove it")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{dest.name}.unfinished-", dir=dest.parent))
    except OSError as error:
        raise ConvertError(f"cannot write to {dest.parent}: {error.strerror}") from None
    try:
        yield folder
        _flush_all(folder)
        folder.chmod(0o777 & ~_umask())
        folder.rename(dest)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise ConvertError(f"{dest} has appeared meanwhile: choose another destination") from None
        if isinstance(error, OSError):
            raise ConvertError(f"could not write {dest}: {error.strerror}; nothing was kept") from None
        raise
    with suppress(OSError):  # it is there, though perhaps not yet on the disk
        flush(dest.parent)


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    converted: Callable[[str], dict[str, mx.array]],
    parameters: int,
    progress: Progress | None,
) -> None:
    """Write the tensors that `converted` makes of each name in `sizes` (their bytes), in shards.

    Only one shard's results and one source tensor are in memory at a time. Raises ConvertError
    before the work if the disk has no place for it.
    """
    total, done = sum(sizes.values()), 0
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ConvertError(
            f"the result needs {total / 1e9:.3f} GB, the disk of {folder.parent} has {free / 1e9:.3f} "
            f"GB left: make room, or write elsewhere"
        )
    shards = _shards(sizes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, mx.array] = {}
        for name in names:
            made = converted(name)
            mx.eval(*made.values())
            tensors |= made
            done += sizes[name]
            if progress is not None:
                progress(done, total)
        _save(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / INDEX, index)


def write_config(
    folder: Path, config: Mapping[str, Any], rope: Mapping[str, RopeConfig], recipe: Recipe
) -> None:
    """Write config.json: the source's, whose RoPE was read as `rope`, with how it is quantized now, in
    keys that mlx-lm reads too.
    """
    config = _with_older_rope(config, rope)
    if recipe.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(recipe.dtype).rpartition(".")[2]
    if recipe.how is not None:
        how = recipe.how
        block = {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}
        config |= {"quantization": block, "quantization_config": block}
    _write_json(folder / "config.json", config)


def copy_files(source: Path, folder: Path) -> None:
    """Copy the small files (tokenizer, template, generation defaults) that are not written anew."""
    for name in TEXT_FILES:
        if name not in ("config.json", INDEX) and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _with_older_rope(config: Mapping[str, Any], rope: Mapping[str, RopeConfig]) -> dict[str, Any]:
    """transformers 4's `rope_theta` and `rope_scaling` for version 5's `rope_parameters`, where they
    can say the same: mlx-lm 0.32.2 reads only those.
    """
    sliding = rope.get(SLIDING, RopeConfig(rope[FULL].theta) if FULL in rope else None)
    full = rope.get(FULL, sliding)
    assert sliding is not None
    assert full is not None
    if "rope_parameters" not in config or sliding != RopeConfig(full.theta):
        return dict(config)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    scaling = None
    if full.rope_type != "default":
        said = {"theta", "truncate"} if full.truncate else {"theta"}  # elsewhere, and by default
        scaling = {key: value for key, value in asdict(full).items() if key not in said}
    return {**older, "rope_theta": full.theta, "rope_scaling": scaling}


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _save(path: Path, tensors: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})
    except RuntimeError as error:
        raise ConvertError(f"could not write {path.name}: {error}; nothing was kept") from None


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush_all(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        flush(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

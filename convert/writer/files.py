"""The small files of a result: config.json, the index, and what is copied as it is."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.recipe import Plan
from convert.writer.layout import Layout
from olmo3_mlx.checkpoints.files import INDEX, LICENSES, TEXT_FILES
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config, RopeConfig
from olmo3_mlx.quantization import Quantization

_GENERATION = "generation_config.json"


def write_index(folder: Path, layout: Layout, parameters: int) -> None:
    """Write which file holds which tensor."""
    index = {
        "metadata": {"total_size": layout.nbytes, "total_parameters": parameters},
        "weight_map": {name: place.file for name, place in sorted(layout.places.items())},
    }
    write_json(folder / INDEX, index)


def write_config(
    folder: Path, data: Mapping[str, Any], config: Olmo3Config, plan: Plan, dtype: mx.Dtype | None
) -> None:
    """Write config.json: the source's `data`, which was read as `config`, with how it is quantized now
    and with the dtype of the rest, if that changed, in keys that mlx-lm reads too.
    """
    data = _with_older_rope(data, config.rope)
    for key in ("quantization", "quantization_config"):
        data.pop(key, None)
    if dtype is not None:
        data.pop("torch_dtype", None)
        data["dtype"] = str(dtype).rpartition(".")[2]
    block = _quantization(plan)
    if block:
        data |= {"quantization": block, "quantization_config": block}
    write_json(folder / "config.json", data)


def copy_files(source: Path, words: Path, folder: Path) -> None:
    """Copy the small files (tokenizer, template, generation defaults, licence) that are not written anew."""
    for name, file in _copied(source, words).items():
        shutil.copyfile(file, folder / name)


def small_files(source: Path, words: Path) -> dict[str, str]:
    """The files that are copied, each with the SHA-256 of its content."""
    files = _copied(source, words)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _copied(source: Path, words: Path) -> dict[str, Path]:
    """The files that are copied, by their names: those of the model from `source`, tokenizer and template
    from `words`, and generation defaults too if `source` has none.
    """
    files = {name: words / name for name in TEXT_FILES if name not in ("config.json", INDEX)}
    files |= {name: source / name for name in LICENSES}
    if (source / _GENERATION).is_file():
        files[_GENERATION] = source / _GENERATION
    return {name: file for name, file in files.items() if file.is_file()}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object for people and programs to read."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _quantization(plan: Plan) -> dict[str, Any]:
    """What most layers have, and each that differs by its path, as MLX reads it."""
    if not plan.layers:
        return {}
    kinds = list(plan.layers.values())
    default = max(kinds, key=kinds.count)
    differing = {path: _block(how) for path, how in plan.layers.items() if how != default}
    return {**_block(default), **differing}


def _block(how: Quantization) -> dict[str, Any]:
    return {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}


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

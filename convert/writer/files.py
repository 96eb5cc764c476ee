"""The small files of a result: config.json, the index, and those that are copied as they are."""

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
from olmo3_mlx.checkpoints.files import INDEX, LICENSES, small_files
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config, RopeConfig
from olmo3_mlx.quantization import Quantization

_GENERATION = "generation_config.json"
_WRITTEN = ("config.json", INDEX, "adapter_config.json")  # anew, or not at all


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
    """Write config.json: the source's `data`, which was read as `config`, with the plan's quantization and
    with the dtype of the rest, if that changed, in keys that mlx-lm reads too.
    """
    data = _with_older_rope(data, config.rope)
    for key in ("quantization", "quantization_config"):
        data.pop(key, None)
    if dtype is not None:
        data.pop("torch_dtype", None)
        data["dtype"] = str(dtype).rpartition(".")[2]
    quantization = _quantization(plan)
    if quantization:
        data |= {"quantization": quantization, "quantization_config": quantization}
    write_json(folder / "config.json", data)


def copy_files(source: Path, tokenizer_folder: Path, folder: Path) -> None:
    """Copy the small files (tokenizer, template, generation defaults, licence) that are not written anew."""
    for name, file in _copied(source, tokenizer_folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


def copied_files(source: Path, tokenizer_folder: Path) -> dict[str, str]:
    """The files that are copied, each with the SHA-256 of its content."""
    files = _copied(source, tokenizer_folder)
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _copied(source: Path, tokenizer_folder: Path) -> dict[str, Path]:
    """The files that are copied, by their names: those of the model from `source`, tokenizer and template
    from `tokenizer_folder`, and generation defaults too if `source` has none.
    """
    of_model = small_files(source)
    files = {name: file for name, file in small_files(tokenizer_folder).items() if name not in _WRITTEN}
    files = {name: file for name, file in files.items() if name not in LICENSES}
    return files | {name: of_model[name] for name in (_GENERATION, *LICENSES) if name in of_model}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object for people and programs to read."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _quantization(plan: Plan) -> dict[str, Any]:
    """The scheme of most layers, and those of layers that differ by their paths, as MLX reads them."""
    if not plan.layers:
        return {}
    schemes = list(plan.layers.values())
    default = max(schemes, key=schemes.count)
    differing = {path: _keys(scheme) for path, scheme in plan.layers.items() if scheme != default}
    return {**_keys(default), **differing}


def _keys(scheme: Quantization) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}


def _with_older_rope(config: Mapping[str, Any], rope: Mapping[str, RopeConfig]) -> dict[str, Any]:
    """Replace version 5's `rope_parameters` by transformers 4's `rope_theta` and `rope_scaling`, where they
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
        elsewhere = {"theta", "truncate"} if full.truncate else {"theta"}  # or said by default
        scaling = {key: value for key, value in asdict(full).items() if key not in elsewhere}
    return {**older, "rope_theta": full.theta, "rope_scaling": scaling}

"""The small files of a result: config.json, the index, and those that are copied as they are."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.reading.stored import reading
from convert.recipe import Plan
from convert.writer.layout import Layout, Spec
from olmo3_mlx.checkpoints.files import INDEX, LICENSES, small_files
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config, RopeConfig
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import Quantization

_GENERATION = "generation_config.json"
_WRITTEN = ("config.json", INDEX, "adapter_config.json")  # anew, or not at all
_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5's, and the older one


def write_index(folder: Path, layout: Layout, parameters: int) -> None:
    """Write which file holds which tensor."""
    index = {
        "metadata": {"total_size": layout.nbytes, "total_parameters": parameters},
        "weight_map": {name: place.file for name, place in sorted(layout.places.items())},
    }
    write_json(folder / INDEX, index)


def write_config(
    folder: Path,
    data: Mapping[str, Any],
    config: Olmo3Config,
    plan: Plan,
    specs: Mapping[str, Mapping[str, Spec]],
) -> None:
    """Write config.json: the source's `data`, which was read as `config`, with what is true of the result:
    the plan's quantization, and the dtype of its tensors, which `specs` lists for each weight. In keys that
    mlx-lm reads too.
    """
    data = _with_older_rope(data, config.rope)
    for key in ("quantization", "quantization_config"):
        data.pop(key, None)
    data |= dict.fromkeys([key for key in _DTYPE_KEYS if key in data] or _DTYPE_KEYS[:1], _dtype(specs))
    quantization = _quantization(plan, Olmo3(config).quantizable())
    if quantization:
        data |= {"quantization": quantization, "quantization_config": quantization}
    write_json(folder / "config.json", data)


def _dtype(specs: Mapping[str, Mapping[str, Spec]]) -> str:
    """The dtype of the tensors that hold numbers as they are: weights, or scales; where they have several,
    that of most numbers.
    """
    numbers: Counter[mx.Dtype] = Counter()
    for parts in specs.values():
        for spec in parts.values():
            if mx.issubdtype(spec.dtype, mx.floating):
                numbers[spec.dtype] += prod(spec.shape)
    return str(numbers.most_common(1)[0][0]).rpartition(".")[2]


def copy_files(source: Path, tokenizer_folder: Path, folder: Path) -> None:
    """Copy the small files (tokenizer, template, generation defaults, licence) that are not written anew.
    Raises CheckpointError for one that cannot be read, OSError if the disk does not take it.
    """
    for name, file in _copied(source, tokenizer_folder).items():
        content = _content(file)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def copied_files(source: Path, tokenizer_folder: Path) -> dict[str, str]:
    """The files that are copied, each with the SHA-256 of its content. Raises CheckpointError."""
    files = _copied(source, tokenizer_folder)
    return {name: hashlib.sha256(_content(file)).hexdigest() for name, file in files.items()}


def _content(file: Path) -> bytes:
    with reading(file):
        return file.read_bytes()


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


def _quantization(plan: Plan, layers: Iterable[str]) -> dict[str, Any]:
    """The scheme of most layers, and those of `layers` that differ by their paths, as MLX reads them: False
    for one that is not quantized.
    """
    if not plan.layers:
        return {}
    schemes = list(plan.layers.values())
    default = max(schemes, key=schemes.count)
    differing: dict[str, Any] = {path: _keys(s) for path, s in plan.layers.items() if s != default}
    plain = dict.fromkeys((path for path in layers if path not in plan.layers), False)
    return {**_keys(default), **differing, **plain}


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

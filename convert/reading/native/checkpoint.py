"""OLMo-core's own checkpoints, as training writes them, as something to convert.

    config, tensors = open_native("stage1/step1413814")

A folder holds the run's config.json and model_and_optim/, a distributed checkpoint. Nothing in it is run,
PyTorch is not needed, and of the files only what is asked for is read. There is no tokenizer in it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.reading.native.config import hugging_face_config
from convert.reading.native.distcp import METADATA, Chunked, chunked_tensors
from olmo3_mlx.checkpoints.headers import name_some
from olmo3_mlx.checkpoints.weights import check_names_and_shapes
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import CheckpointError
from olmo3_mlx.fields import read_json
from olmo3_mlx.model import Olmo3

_FOLDER = "model_and_optim"
_PREFIX = "model."

# OLMo-core's names -> Hugging Face's: nothing is transposed (OLMo-core, src/olmo_core/nn/hf/convert.py).
_OUTER = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
}
_OF_BLOCK = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "post_feedforward_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_BLOCK = re.compile(r"blocks\.(0|[1-9]\d*)\.(.+)\.weight")
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")


def is_native(folder: Path) -> bool:
    """True for a folder that OLMo-core wrote, whole or not."""
    return (folder / _FOLDER).is_dir() or (folder / METADATA).is_file()


def open_native(folder: Path) -> tuple[dict[str, Any], dict[str, Chunked]]:
    """config.json as the official converter would write it (dtype bfloat16, whatever is stored), and the
    tensors, unread yet, by Hugging Face's names, without the rows that pad the vocabulary.

    Raises ConfigError for what Olmo 3 does not have, CheckpointError for files and tensors that are
    missing or damaged.
    """
    if (folder / METADATA).is_file() and folder.name == _FOLDER:
        raise CheckpointError(f"{folder}: is one part of the checkpoint {folder.parent}: name that one")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: expected the run's config.json beside {_FOLDER}, found none: fetch it"
        )
    if not (folder / _FOLDER / METADATA).is_file():
        raise CheckpointError(f"{folder}: expected {_FOLDER}/{METADATA}, found none: fetch it, it is hidden")
    where = folder / "config.json"
    run = read_json(where)
    config = hugging_face_config(run, str(where))
    read = Olmo3Config.from_dict(config, str(where))
    stored = _renamed(chunked_tensors(folder / _FOLDER, _PREFIX), folder)
    tensors = _without_padding(stored, folder, run["model"]["vocab_size"], read.vocab_size)
    check_names_and_shapes(Olmo3(read), tensors, folder)
    return config, tensors


def files_read(folder: Path, tensors: Mapping[str, Chunked]) -> set[Path]:
    """Of a checkpoint's files those that its config and these tensors are in."""
    chunks = {chunk.file for tensor in tensors.values() for chunk in tensor.chunks}
    return {folder / "config.json", folder / _FOLDER / METADATA, *chunks}


def _renamed(stored: Mapping[str, Chunked], folder: Path) -> dict[str, Chunked]:
    names = {name: _name(name) for name in stored}
    unknown = sorted(name for name, new in names.items() if new is None)
    if unknown:
        raise CheckpointError(f"{folder}: has tensors that no Olmo 3 has: {name_some(unknown)}")
    return {new: stored[name] for name, new in names.items() if new}


def _name(name: str) -> str | None:
    """Hugging Face's name, if there is one."""
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _OUTER.get(name)
    part = _OF_BLOCK.get(block[2])
    return part and f"model.layers.{block[1]}.{part}.weight"


def _without_padding(
    stored: Mapping[str, Chunked], folder: Path, padded: int, vocabulary: int
) -> dict[str, Chunked]:
    """Embedding and head cut to the tokenizer's vocabulary: training pads it to a multiple of 128."""
    tensors = dict(stored)
    for name in _PADDED:
        if name not in tensors:
            continue  # check_names_and_shapes says so
        shape = tensors[name].shape
        if shape[0] != padded:
            raise CheckpointError(f"{folder}: {name} has {shape[0]} rows, its config says {padded}")
        tensors[name] = replace(tensors[name], shape=(vocabulary, *shape[1:]))
    return tensors

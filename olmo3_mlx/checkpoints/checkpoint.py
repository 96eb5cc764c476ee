"""A checkpoint: a folder with config.json, weights and a tokenizer, as Hugging Face and MLX write it.

Tensors bear the names of the model's modules, so nothing is renamed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Unpack

import mlx.core as mx

from olmo3_mlx.caches.options import CacheKeywords, CacheOptions
from olmo3_mlx.checkpoints.files import check_whole_model, weight_files, weight_files_if_whole
from olmo3_mlx.checkpoints.headers import TensorHeader, all_headers
from olmo3_mlx.checkpoints.names import resolve
from olmo3_mlx.checkpoints.stored_bits import with_stored_quantization
from olmo3_mlx.checkpoints.weights import (
    check_finite,
    check_names_and_shapes,
    default_dtype,
    dtype_named,
    quantize,
    read_weights,
)
from olmo3_mlx.config import GenerationConfig, Olmo3Config
from olmo3_mlx.fields import read_json
from olmo3_mlx.memory.plan import MemoryPlan, plan
from olmo3_mlx.model import Olmo3
from olmo3_mlx.text.tokenizer import Tokenizer


def load(
    model: str | Path, *, revision: str | None = None, dtype: str | mx.Dtype | None = None
) -> tuple[Olmo3, Tokenizer]:
    """Load a model and its tokenizer.

    `model` is "demo", a checkpoint's folder, or a hub id, then at `revision` (branch, tag, commit).
    `dtype` ("bfloat16", "float16", "float32") is what the model computes in; left out, it is the
    checkpoint's, except on MLX's CPU backend (see `default_dtype`).

    Raises ConfigError, CheckpointError, HubError, TokenizerError or TemplateError, each with one
    line that says what is wrong with which file; OptionError for another `dtype`.
    """
    target = None if dtype is None else dtype_named(dtype)
    checkpoint = Checkpoint.open(model, revision)
    tokenizer = checkpoint.tokenizer  # before the weights, which take longer
    return checkpoint.load(target), tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what its files say: config and headers are read when it is opened, the
    tokenizer once, when it is first asked for.
    """

    folder: Path
    config: Olmo3Config
    generation_config: GenerationConfig
    _headers: Mapping[str, TensorHeader] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None, *, weights: bool = True) -> "Checkpoint":
        """Find a checkpoint by its name, "demo", a folder, or a hub id at `revision`, and read its config. A
        hub id is downloaded first, just its small files if not `weights`.

        Raises CheckpointError, HubError or ConfigError.
        """
        return cls.in_folder(resolve(name, revision, weights=weights))

    @classmethod
    def in_folder(cls, folder: str | Path) -> "Checkpoint":
        """The checkpoint in a folder. Raises CheckpointError or ConfigError."""
        folder = Path(folder)
        check_whole_model(folder)
        path = folder / "config.json"
        files = weight_files_if_whole(folder)
        headers = all_headers(files) if files else None
        data = with_stored_quantization(read_json(path), headers or {}, str(path))
        config = Olmo3Config.from_dict(data, str(path))
        path = folder / "generation_config.json"
        data = read_json(path) if path.is_file() else {}
        defaults = GenerationConfig.from_dict(data, eos_token_ids=config.eos_token_ids, where=str(path))
        return cls(folder, config, defaults, headers)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises TokenizerError or TemplateError."""
        return Tokenizer.from_folder(self.folder)

    @cached_property
    def weight_files(self) -> list[Path]:
        """Its safetensors files. Raises CheckpointError if one is missing."""
        return weight_files(self.folder)

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Its tensors by name, unread. Raises CheckpointError if files are missing."""
        return all_headers(self.weight_files) if self._headers is None else self._headers

    @cached_property
    def default_dtype(self) -> mx.Dtype | None:
        """What `load` casts to unless told; None for the checkpoint's own type. See weights.py."""
        return default_dtype(self.headers)

    def plan(
        self,
        options: CacheOptions | None = None,
        *,
        context: int | None = None,
        dtype: str | mx.Dtype | None = None,
        **keywords: Unpack[CacheKeywords],
    ) -> MemoryPlan:
        """What running it takes with caches of these `options` (or the same as keywords): for a context of so
        many tokens, or for the largest that fits. Nothing is loaded.

        Raises MemoryFitError, which says what would fit, and OptionError; see `olmo3_mlx.memory.plan`.
        """
        options = CacheOptions.of(options, **keywords)
        itemsize = self.itemsize(dtype)
        return plan(self.config, self.weight_bytes(dtype), options, context=context, itemsize=itemsize)

    def load(self, dtype: str | mx.Dtype | None = None) -> Olmo3:
        """The model, checked and evaluated. It computes in `dtype`, left out in `default_dtype`.

        Raises CheckpointError for tensors that are missing, unexpected, misshapen or not finite, before
        any data is read where the headers tell.
        """
        model = Olmo3(self.config, self.generation_config)
        quantize(model, self.headers, self.folder)
        check_names_and_shapes(model, self.headers, self.folder)
        target = self._target(dtype)
        weights = read_weights(self.weight_files)
        if target is not None:
            weights = {name: _cast(weight, target) for name, weight in weights.items()}
        check_finite(weights, self.folder, self.config.quantization)
        model.load_weights(list(weights.items()))
        mx.eval(model.parameters())
        return model

    def weight_bytes(self, dtype: str | mx.Dtype | None = None) -> int:
        """What the weights take once `load` has them in `dtype`. Raises what `headers` raises."""
        target = self._target(dtype)
        return sum(header.size * _loaded(header, target).size for header in self.headers.values())

    def itemsize(self, dtype: str | mx.Dtype | None = None) -> int:
        """Bytes of one number that the model loaded in `dtype` computes with, and that its caches hold."""
        # A model computes in its norms' dtype, and those are never quantized.
        norm = self.headers.get("model.norm.weight")
        return 2 if norm is None else _loaded(norm, self._target(dtype)).size

    def _target(self, dtype: str | mx.Dtype | None) -> mx.Dtype | None:
        """What weights are cast to where `dtype` is asked for; None for the checkpoint's own type."""
        return self.default_dtype if dtype is None else dtype_named(dtype)


def _loaded(header: TensorHeader, dtype: mx.Dtype | None) -> mx.Dtype:
    """The type that a tensor is loaded in."""
    return dtype if dtype is not None and mx.issubdtype(header.dtype, mx.floating) else header.dtype


def _cast(weight: mx.array, dtype: mx.Dtype) -> mx.array:
    return weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight

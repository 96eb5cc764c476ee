"""Checkpoints to MLX form, a few rows at a time: read, quantize, write, read back.

from convert import convert
print(convert("allenai/Olmo-3-7B-Instruct", "olmo3-7b-4bit", bits=4).bits_per_weight)
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.files import copy_files, write_config, write_index
from convert.folder import check_room, new_folder
from convert.journal import Journal
from convert.layout import Layout, Spec, lay_out, parts
from convert.model_card import Made, origin, write_model_card
from convert.output import Output
from convert.pipeline import ahead
from convert.quantize import pieces, rounded
from convert.recipe import Plan, Recipe, uniform
from convert.recipe import named as recipe_named
from convert.source import Source
from convert.upload import check_upload, upload
from olmo3_mlx import __version__
from olmo3_mlx.checkpoint import check_finite, dtype_named
from olmo3_mlx.errors import ConvertError
from olmo3_mlx.hub import resolve
from olmo3_mlx.model import Olmo3

__all__ = ["Report", "convert"]

_PROGRAM = f"olmo3-mlx {__version__} with mlx {version('mlx')}"
_SHARDS = "shards"  # of a model on the hub, until they are converted

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Report:
    """What a conversion made. `left_out` names layers that the group size does not divide."""

    parameters: int
    source_bytes: int
    bytes: int
    seconds: float
    left_out: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole result, scales and unquantized tensors included, over all weights."""
        return self.bytes * 8 / self.parameters


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    bits: int | None = 4,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str | Path | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    resume: bool = False,
    keep: bool = True,
    upload_to: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint `source` (a folder, or a hub id at `revision`) to the new folder `dest`.

    Linear layers, embedding and head are quantized by rounding to nearest: all to `bits`, with one
    scale for `group_size` weights (64, or what the mode has) in MLX's `mode`, or else as `recipe` says,
    one of RECIPES or a TOML file (see convert.recipe). With `bits` None and no recipe nothing is
    quantized, and a quantized source is dequantized. `dtype` casts the rest, scales included.

    `dest` appears when it is complete and was read back. A run that was killed leaves a hidden folder
    beside it, in which `resume` goes on, to the same bytes. `progress(done, total)` counts bytes.
    Memory stays at some rows of the largest tensor. Of a model on the hub a file is fetched when it is
    needed; with `keep` False it goes when it was converted, so that the disk holds one of them at most.
    `tokenizer` is a checkpoint to take tokenizer and chat template from: OLMo-core's own have none.
    `upload_to` names a repository on the hub that gets the result.

    Raises OptionError for options that do not exist or go together; ConfigError, CheckpointError or
    HubError for a source that cannot be read or holds NaN; ConvertError for one that is quantized
    already, a recipe that does not fit it, and a destination that exists or cannot be written.
    """
    begin = time.perf_counter()
    how = _recipe(bits, group_size, mode, recipe)
    cast = None if dtype is None else dtype_named(dtype)
    if upload_to is not None:
        check_upload(upload_to)
    with new_folder(Path(dest), resume=resume) as folder:
        shards = None if keep else folder / _SHARDS
        work = _Work(Source.open(source, revision, shards), how, cast)
        words = None if tokenizer is None else resolve(tokenizer, weights=False)
        work.write(folder, words, progress)
        work.describe(folder, upload_to or Path(dest).name)
        shutil.rmtree(folder / _SHARDS, ignore_errors=True)
    if upload_to is not None:
        upload(Path(dest), upload_to)
    return Report(
        parameters=work.parameters,
        source_bytes=sum(tensor.nbytes for tensor in work.source.tensors.values()),
        bytes=work.layout.nbytes,
        seconds=time.perf_counter() - begin,
        left_out=work.plan.left_out,
    )


class _Work:
    """One conversion: what of the source becomes what, and where."""

    def __init__(self, source: Source, recipe: Recipe, dtype: mx.Dtype | None) -> None:
        self.source, self.dtype = source, dtype or source.dtype
        if source.config.quantization is not None and recipe.default is not None:
            how = source.config.quantization.default
            raise ConvertError(
                f"{source.folder} is quantized already ({how.bits} bits, {how.mode}): quantizing again "
                f"loses more than it should: convert the original (or dequantize it: --dtype alone, "
                f"bits=None)"
            )
        model = Olmo3(source.config)
        self.names = list(model.tensors())
        self.plan: Plan = recipe.plan(model)
        self.specs = {name: self._specs(name) for name in self.names}
        self.layout: Layout = lay_out(list(self.specs.values()))
        self.parameters = sum(prod(source.tensors[name].shape) for name in self.names)

    def write(self, folder: Path, tokenizer: Path | None, progress: Progress | None) -> None:
        """Fill the folder; the small files are those of the checkpoint `tokenizer`, or the source's."""
        journal = Journal(folder, self._identity())
        check_room(folder, self.layout, self.source.largest_shard())
        output = Output(folder, self.layout, journal)
        done = sum(spec.nbytes for name in journal.done for spec in self.specs[name].values())
        todo = [name for name in self.names if name not in journal.done]
        for name, piece in ahead(self._converted(ahead(self._read(todo)))):
            output.write(name, piece)
            done += sum(array.nbytes for array in piece.values())
            if progress is not None:
                progress(done, self.layout.nbytes)
        self.source.check_unchanged()
        output.finish()
        write_index(folder, self.layout, self.parameters)
        write_config(folder, self.source.data, self.source.config, self.plan, self.dtype)
        copy_files(tokenizer or self.source.folder, folder)

    def describe(self, folder: Path, name: str) -> None:
        """Write the model card; the model is called `name`."""
        base, license = origin(self.source.folder)
        made = Made(
            name=name,
            base=base,
            license=license,
            plan=self.plan,
            dtype=str(self._dtype("model.norm.weight")).rpartition(".")[2],
            bits_per_weight=self.layout.nbytes * 8 / self.parameters,
            nbytes=self.layout.nbytes,
            program=_PROGRAM,
            chats=(folder / "chat_template.jinja").exists(),
        )
        write_model_card(folder, made)

    def _read(self, names: list[str]) -> Iterator[tuple[str, mx.array]]:
        """Tensors by name, some rows at a time, in the dtype they will have."""
        for place, name in enumerate(names, start=1):
            for rows in pieces(self.source.tensors[name]):
                weight = rows.astype(self._dtype(name))
                check_finite({name: weight}, self.source.folder)
                yield name, weight
            self.source.release(name, names[place:])
            self.source.check_unchanged()

    def _converted(
        self, weights: Iterator[tuple[str, mx.array]]
    ) -> Iterator[tuple[str, dict[str, mx.array]]]:
        """What those rows become."""
        for name, weight in weights:
            made = rounded(name, weight, self.plan.of(name))
            mx.eval(*made.values())
            yield name, made

    def _specs(self, name: str) -> dict[str, Spec]:
        return parts(name, self.source.tensors[name].shape, self._dtype(name), self.plan.of(name))

    def _dtype(self, name: str) -> mx.Dtype:
        return self.dtype or self.source.tensors[name].dtype

    def _identity(self) -> dict[str, Any]:
        return {
            "program": _PROGRAM,
            "source": self.source.identity(),
            "dtype": str(self.dtype),
            "layers": {path: [how.bits, how.group_size, how.mode] for path, how in self.plan.layers.items()},
        }


def _recipe(bits: int | None, group_size: int | None, mode: str, recipe: str | Path | None) -> Recipe:
    if recipe is not None:
        return recipe_named(recipe)
    return Recipe(None if bits is None else uniform(bits, group_size, mode))

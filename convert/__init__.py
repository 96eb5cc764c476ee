"""Checkpoints to MLX form: read (source), quantize, write.

from convert import convert
print(convert("allenai/Olmo-3-7B-Instruct", "olmo3-7b-4bit", bits=4).bits_per_weight)
"""

import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from convert.quantize import Recipe, affine
from convert.source import Source
from convert.write import Progress, copy_files, new_folder, write_config, write_weights
from olmo3_mlx.checkpoint import check_finite, dtype_named

__all__ = ["Report", "convert"]


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
    group_size: int = 64,
    dtype: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint `source` (a folder, or a hub id at `revision`) to the new folder `dest`.

    Quantizes linear layers, embedding and head to `bits` per weight, with one scale and bias for
    `group_size` weights (MLX's affine mode); None quantizes nothing. `dtype` casts the rest, scales
    included. `dest` appears only when it is complete. `progress(done, total)` counts bytes.

    Raises OptionError for bits or a group size that do not exist; ConfigError, CheckpointError or
    HubError for a source that cannot be read or holds NaN; ConvertError for one that is quantized
    already, a group size that divides no layer, and a destination that exists or cannot be written.
    """
    begin = time.perf_counter()
    how = None if bits is None else affine(bits, group_size)
    cast = None if dtype is None else dtype_named(dtype)
    with new_folder(Path(dest)) as folder:
        origin = Source.open(source, revision)
        recipe = Recipe.make(origin.model, how, cast)
        weights = {name: origin.weights.pop(name) for name in origin.model.tensors()}  # layer by layer
        parameters = sum(w.size for w in weights.values())
        source_bytes = sum(w.nbytes for w in weights.values())
        sizes = {name: recipe.bytes_of(name, w) for name, w in weights.items()}

        def converted(name: str) -> dict[str, mx.array]:
            weight = recipe.cast(weights.pop(name))  # popped, to be let go of once it is written
            check_finite({name: weight}, origin.folder)
            return recipe.apply(name, weight)

        write_weights(folder, sizes, converted, parameters, progress)
        write_config(folder, origin.config, origin.model.config.rope, recipe)
        copy_files(origin.folder, folder)
    return Report(
        parameters=parameters,
        source_bytes=source_bytes,
        bytes=sum(sizes.values()),
        seconds=time.perf_counter() - begin,
        left_out=recipe.left_out,
    )

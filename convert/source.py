"""What is converted: a checkpoint's config and tensors, checked like any that is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from olmo3_mlx.checkpoint import check_names_and_shapes, load_config, read_weights
from olmo3_mlx.errors import ConvertError
from olmo3_mlx.fields import read_json
from olmo3_mlx.hub import resolve
from olmo3_mlx.model import Olmo3


@dataclass(frozen=True)
class Source:
    """An unquantized checkpoint: its folder, config.json as it stands, and its tensors, unread yet.

    `model` is of its architecture, with weights of its own that are never evaluated.
    """

    folder: Path
    config: dict[str, Any]
    model: Olmo3
    weights: dict[str, mx.array]

    @classmethod
    def open(cls, name: str | Path, revision: str | None = None) -> "Source":
        """Find (download) and check it.

        Raises ConvertError if it is quantized, CheckpointError for tensors that are missing, extra
        or misshapen.
        """
        folder = resolve(name, revision)
        config, _ = load_config(folder)
        if config.quantization is not None:
            how = config.quantization.default
            raise ConvertError(
                f"{name} is quantized already ({how.bits} bits, {how.mode}): quantizing again loses "
                f"more than it should: convert the original"
            )
        weights = read_weights(folder)
        model = Olmo3(config)
        check_names_and_shapes(model, weights, folder)
        return cls(folder, read_json(folder / "config.json"), model, weights)

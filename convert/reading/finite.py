"""Looking for weights that are not finite, before they do harm or after."""

import mlx.core as mx

from convert.progress import Count, Progress
from convert.reading.source import Source
from convert.reading.stored import pieces
from olmo3_mlx.checkpoints.weights import check_finite


def check_all_finite(source: Source, dtype: mx.Dtype | None = None, progress: Progress | None = None) -> None:
    """Raise CheckpointError for a weight that is not finite in `dtype`, or in its own if that is None.

    Weights are read some rows at a time; `progress` counts them.
    """
    count = Count(source.parameters, progress)
    for name, tensor in source.tensors.items():
        for rows in pieces(tensor):
            check_finite({name: rows if dtype is None else rows.astype(dtype)}, source.folder)
            count(rows.size)

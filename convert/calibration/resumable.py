"""Calibrated quantization, one block after another, also by a run that goes on where one stopped."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import mlx.core as mx

from convert.calibration.blocks import EMBEDDING, HEAD, Calibration
from convert.layers import Layers
from convert.quantize import pieces
from convert.recipe import Plan
from convert.source import Source
from olmo3_mlx.checkpoint import check_finite

_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def calibrated(
    source: Source,
    plan: Plan,
    tokens: mx.array,
    dtype: mx.Dtype | None,
    *,
    done: Iterable[str],
    there: Source,
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """The tensors that each weight of `plan` becomes, by the weight's name, less those `done` before, which
    are in `there`. `tokens` [N, L] are what to calibrate on.

    Raises CheckpointError before the long work for weights that are not finite.
    """
    names = [name for name in source.tensors if plan.of(name) is not None]
    for name in names:
        for rows in pieces(source.tensors[name]):
            check_finite({name: rows if dtype is None else rows.astype(dtype)}, source.folder)
    calibration, written = Calibration(source, plan.layers, tokens, dtype), Layers(there)
    waiting = set(names) - set(done)
    made_by: dict[str, Callable[[], dict[str, mx.array]]] = {
        f"{EMBEDDING}.weight": calibration.embedding,
        f"{HEAD}.weight": calibration.head,
    }
    every = [f"{EMBEDDING}.weight", *(n for n in names if _BLOCK.match(n)), f"{HEAD}.weight"]
    for unit, group in groupby(sorted(every, key=_place), key=_place):
        members = list(group)
        if unit in range(source.config.num_hidden_layers):
            if waiting.isdisjoint(members):
                calibration.skip(unit, written.block(unit))
                continue
            made = calibration.block(unit)
        else:
            made = made_by[members[0]]()
        for name in members:
            if name in waiting:
                path = name.removesuffix(".weight")
                parts = (name, f"{path}.scales", f"{path}.biases")
                yield name, {part: made[part] for part in parts if part in made}


def _place(name: str) -> int:
    """The number of a weight's block; the embedding comes before them all, the head after."""
    block = _BLOCK.match(name)
    if block is not None:
        return int(block[1])
    return -1 if name.startswith(EMBEDDING) else 2**31

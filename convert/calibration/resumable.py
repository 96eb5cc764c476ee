"""Calibrated quantization, one block after another, also by a run that goes on where one stopped."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from convert.calibration.calibration import EMBEDDING, HEAD, Calibration
from convert.progress import Stage
from convert.reading.layers import Layers
from convert.reading.source import Source
from convert.recipe import Plan


def calibrated(
    source: Source,
    plan: Plan,
    tokens: mx.array,
    dtype: mx.Dtype | None,
    *,
    done: Iterable[str],
    there: Source,
    stage: Stage,
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """The tensors that each weight of `plan` becomes, by the weight's name, less those `done` before, which
    are in `there`. `tokens` [N, L] are what to calibrate on; `stage` is told what comes next.
    """
    calibration, written = Calibration(source, plan.layers, tokens, dtype), Layers(there)
    waiting = {name for name in source.tensors if plan.of(name) is not None} - set(done)
    for unit in _units(calibration, source, written):
        todo = [name for name in unit.names if name in waiting]
        if not todo:
            stage(f"going past {unit.what}, which is done")
            unit.skip()
            continue
        stage(f"calibrating {unit.what}")
        made = unit.make()
        for name in todo:
            path = name.removesuffix(".weight")
            parts = (name, f"{path}.scales", f"{path}.biases")
            yield name, {part: made[part] for part in parts if part in made}


class _Unit(NamedTuple):
    """Weights that are made together, what makes them, and what goes past them."""

    what: str
    names: Sequence[str]
    make: Callable[[], dict[str, mx.array]]
    skip: Callable[[], None]


def _units(calibration: Calibration, source: Source, written: Layers) -> Iterator[_Unit]:
    yield _Unit(
        "the embedding",
        [f"{EMBEDDING}.weight"],
        calibration.embedding,
        lambda: calibration.skip_embedding(written),
    )
    for index in range(written.count):
        prefix = f"model.layers.{index}."
        yield _Unit(
            f"layer {index + 1} of {written.count}",
            [name for name in source.tensors if name.startswith(prefix)],
            partial(calibration.block, index),
            lambda index=index: calibration.skip(index, written.block(index)),  # type: ignore[misc]
        )
    yield _Unit("the head", [f"{HEAD}.weight"], calibration.head, lambda: None)

"""Calibrated quantization, one block after another, also by a run that goes on where one stopped."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import mlx.core as mx

from convert.calibration.calibration import EMBEDDING, HEAD, Calibration
from convert.progress import Stage
from convert.quantized import part_names
from convert.reading.layers import Layers
from convert.reading.source import Source
from convert.recipe import Plan
from convert.remaining import Remaining


def calibrated(
    source: Source,
    plan: Plan,
    tokens: mx.array,
    dtype: mx.Dtype | None,
    *,
    done: Iterable[str],
    result: Source,
    stage: Stage,
    passed: Callable[[Iterable[str]], None],
) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """Quantize the weights of `plan`: the tensors that each becomes, by its name, less those `done` before,
    which are in `result`. `tokens` [N, L] are the text to calibrate on; `stage` is told what comes next and,
    once a block is done, how long the rest will take; `passed` which weights are quantized, or have been gone
    past.
    """
    left: set[str] = set()  # to be quantized in this step

    def quantized(name: str) -> None:
        if name in left:
            left.remove(name)
            passed([name])

    calibration = Calibration(source, plan.layers, tokens, dtype, quantized)
    written = Layers(result)
    planned = {name for name in source.tensors if plan.of(name) is not None}
    waiting = planned - set(done)
    steps = list(_steps(calibration, source, written))
    rest = Remaining([_work(source, planned, step) for step in steps if waiting.intersection(step.names)])
    for step in steps:
        todo = [name for name in step.names if name in waiting]
        before = [name for name in step.names if name in planned and name not in waiting]
        if not todo:
            stage(f"calibrating, past {step.title}")
            step.skip()
            passed(before)
            continue
        stage(f"calibrating, {step.title}{rest.in_words}")
        rest.begin()
        passed(before)
        left.update(todo)
        tensors = step.quantize()
        passed(left)
        left.clear()
        for name in todo:
            yield name, {part: tensors[part] for part in part_names(name) if part in tensors}
        rest.end()


def _work(source: Source, planned: Collection[str], step: "_Step") -> int:
    """The weights that a step quantizes; 0 for the embedding, which is done in another way than the rest."""
    names = [name for name in step.names if name in planned and name != f"{EMBEDDING}.weight"]
    return sum(prod(source.tensors[name].shape) for name in names)


class _Step(NamedTuple):
    """Weights that are quantized together: `quantize` gives their tensors, `skip` goes past them."""

    title: str
    names: Sequence[str]
    quantize: Callable[[], dict[str, mx.array]]
    skip: Callable[[], None]


def _steps(calibration: Calibration, source: Source, written: Layers) -> Iterator[_Step]:
    """The steps in their order: embedding, blocks, head."""
    yield _Step(
        "the embedding",
        [f"{EMBEDDING}.weight"],
        calibration.embedding,
        lambda: calibration.skip_embedding(written),
    )
    for index in range(written.count):
        prefix = f"model.layers.{index}."
        yield _Step(
            f"layer {index + 1} of {written.count}",
            [name for name in source.tensors if name.startswith(prefix)],
            partial(calibration.block, index),
            partial(calibration.skip, index, written),
        )
    yield _Step("the head", [f"{HEAD}.weight"], calibration.head, lambda: None)

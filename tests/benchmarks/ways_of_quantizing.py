"""The ways of quantizing that benchmarks compare, ours and mlx-lm's: each gives weights and their size."""

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from convert import ConvertOptions, convert
from convert.preparing import prepare
from convert.reading.source import Source
from convert.reading.stored import read
from convert.sampling.itself import Itself
from convert.texts import kinds, shipped

UNQUANTIZED, GPTQ, DYNAMIC, DWQ = "unquantized", "gptq", "dynamic_quant", "dwq"
RECIPES = ("mixed_3_5", "mixed_4_5", "mixed_4_6")
# Bits of dynamic_quant's less and more sensitive layers; 4 and 5 are its defaults.
PAIRS = ((2, 3), (2, 4), (3, 4), (3, 5), (4, 5), (4, 6), (5, 6), (6, 8))
SIZE_OF_4_BITS = 4.5  # this target means exactly what plain rounding to 4 bits in groups of 64 takes

# The shipped kinds of text that are left out with a kind that is measured on.
LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "novels": (kinds.PROSE,),
    "documents": (kinds.DOCUMENTS,),
    "code": (kinds.CODE,),
    "conversations": (kinds.CONVERSATIONS,),  # and what the model writes itself
}


@dataclass(frozen=True)
class Quantized:
    """A result: the weights that it stands for, in float32, and what it took.

    name      the row's
    tensors   by the checkpoint's names
    bits      per weight, scales and unquantized tensors included
    seconds   that quantizing took; of mlx-lm's dynamic_quant, of all sizes together until this one
    tokens    that were read for it; None where that is not known
    """

    name: str
    tensors: dict[str, mx.array]
    bits: float
    seconds: float
    tokens: int | None = None


def rounding(bits: int, group_size: int) -> str:
    return f"rounding-{bits}-{group_size}"


def calibrated(target: float, left_out: str | None = None) -> str:
    return f"calibrated-{target:g}" + (f"-without-{left_out}" if left_out else "")


def dynamic(low: int, high: int) -> str:
    return f"{DYNAMIC}-{low}-{high}"


def dynamic_row(low: int, high: int, target: float) -> str:
    return f"{dynamic(low, high)}-{target:g}"


def dynamic_targets(low: int, high: int, targets: Sequence[float]) -> list[float]:
    """Those of some sizes that lie between all layers at `low` bits and all at `high`."""
    return [target for target in targets if low + 0.55 < target < high + 0.45]


def quantize(
    folder: Path, method: str, targets: Sequence[float], written: Path | None = None
) -> Iterator[Quantized]:
    """The results of a method, by its name: one, or of dynamic_quant one for each target that it can have.
    What the checkpoint writes itself to be calibrated on is kept in the folder `written` for the next time.
    """
    if found := re.fullmatch(r"rounding-(\d)-(\d+)", method):
        yield _ours(folder, method, bits=int(found[1]), group_size=int(found[2]))
    elif method in RECIPES:
        yield _ours(folder, method, recipe=method)
    elif found := re.fullmatch(r"calibrated-([\d.]+)(?:-without-(\w+))?", method):
        target = float(found[1])
        options: dict[str, Any] = {} if target == SIZE_OF_4_BITS else {"target_bpw": target}
        with ExitStack() as patches:
            if written is not None:
                _write_once(written / f"{folder.name}.json", patches)
            if found[2]:
                _leave_out(found[2], patches)
            yield _ours(folder, method, calibrate=True, **options)
    else:
        yield from _theirs(folder, method, targets)


def _ours(folder: Path, name: str, **options: Any) -> Quantized:
    with tempfile.TemporaryDirectory() as parent:
        result = Path(parent) / "result"
        report = convert(folder, result, **options)
        tensors = {n: read(t).astype(mx.float32) for n, t in Source.open(result).tensors.items()}
        mx.eval(tensors)
    return Quantized(name, tensors, report.bits_per_weight, report.seconds)


def _write_once(file: Path, patches: ExitStack) -> None:
    """Have the checkpoint write its text only if the file does not have it: the same for every size."""
    write = Itself.written

    def written(itself: Itself, count: int, *rest: Any) -> list[list[int]]:
        found: list[list[int]] = json.loads(file.read_text()) if file.is_file() else []
        if len(found) < count:
            found = write(itself, count, *rest)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
        return found[:count]

    patches.enter_context(mock.patch.object(Itself, "written", written))


def _leave_out(kind: str, patches: ExitStack) -> None:
    """Have calibration read the shipped texts without that kind, the others with their usual shares."""
    left = {k: v for k, v in shipped._CALIBRATION.items() if k not in LEFT_OUT[kind]}
    patches.enter_context(mock.patch.object(shipped, "_CALIBRATION", left))
    if kind == "conversations":
        nobody = {True: False, False: False}
        patches.enter_context(mock.patch("convert.calibration_texts._WRITES_BY_DEFAULT", nobody))


def _theirs(folder: Path, method: str, targets: Sequence[float]) -> Iterator[Quantized]:
    import learned_quants_of_mlx_lm as learned  # (seconds to import)

    source = Source.open(folder)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    began = time.perf_counter()

    def result(name: str, found: learned.Learned) -> Quantized:
        seconds = time.perf_counter() - began
        bits = 8 * sum(array.nbytes for array in found.tensors.values()) / source.parameters
        return Quantized(name, learned.dense(found.tensors, shapes), bits, seconds, found.tokens)

    if method == GPTQ:
        yield result(method, learned.with_gptq(folder))
    elif method == DWQ:
        yield result(method, learned.with_dwq(folder))
    else:
        low, high = map(int, method.removeprefix(f"{DYNAMIC}-").split("-"))
        reached = dynamic_targets(low, high, targets)
        sizes = [_size_of_4_bits(folder) if target == SIZE_OF_4_BITS else target for target in reached]
        results = learned.with_dynamic_quant(folder, low, high, sizes)
        for target, found in zip(reached, results, strict=True):
            yield result(dynamic_row(low, high, target), found)


def _size_of_4_bits(folder: Path) -> float:
    return prepare(Source.open(folder), ConvertOptions(bits=4, group_size=64)).size.bits_per_weight

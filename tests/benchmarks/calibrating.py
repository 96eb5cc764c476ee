"""Time and peak memory of calibrating at the 7B's or 32B's shape, step by step.

    python tests/benchmarks/calibrating.py [--shape 7b|32b] [--layers N] [--folder DIR] [--within]

Converts a checkpoint of random weights with N of its layers (2.05 GB with one of the 7B's, 3.03 with one of
the 32B's) with `calibrate=True`, but for the text that the model writes itself, whose time depends on the
number of layers and was measured apart.
Prints when each step ended, with the peak so far of MLX's memory and of the whole process. `--within` says
what a step is made of, in seconds, and takes longer, as the device is waited for.
"""

import argparse
import importlib.metadata
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from converting import checkpoint

from convert import convert
from convert.calibration import gptq, resumable
from convert.calibration.fisher import Fisher
from convert.calibration.metric import Metric
from convert.calibration.moments import Moments
from convert.calibration.outputs import Outputs
from convert.calibration.sensitivity import choose
from convert.calibration.sides import Side

# What a step is made of: functions that do not call each other.
PARTS: tuple[tuple[Any, str], ...] = (
    *((gptq, name) for name in ("searched", "_gptq", "refitted", "_descended")),
    *((Side, name) for name in ("attend", "add_attention", "add_feed_forward")),
    (Fisher, "embedding"),
    (Fisher, "outputs"),
    (Outputs, "__init__"),
    (Outputs, "target"),
    (Metric, "inverse"),
    (Moments, "of"),
)


def timed(name: str, function: Callable[..., Any], within: dict[str, float]) -> Callable[..., Any]:
    """The same, adding the seconds that it takes to `within`."""

    def call(*args: Any, **options: Any) -> Any:
        mx.synchronize()
        begin = time.perf_counter()
        result = function(*args, **options)
        if isinstance(result, mx.array | list | dict):
            mx.eval(result)
        mx.synchronize()
        within[name.strip("_")] += time.perf_counter() - begin
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=("7b", "32b"), default="7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "converting")
    parser.add_argument("--within", action="store_true", help="say what each step is made of")
    args = parser.parse_args()
    source, dest = args.folder / f"{args.shape}-{args.layers}", args.folder / "calibrated"
    # In a process of its own: what this one had in memory would count.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        other.submit(checkpoint, source, args.shape, args.layers).result()
    shutil.rmtree(dest, ignore_errors=True)
    print("mlx", importlib.metadata.version("mlx"), mx.default_device(), "\n")
    print("| step | ended after, s | MLX's peak, GB | the process's, GB |\n|---|---|---|---|")
    within: dict[str, float] = defaultdict(float)
    if args.within:
        for owner, name in PARTS:
            setattr(owner, name, timed(name, getattr(owner, name), within))
    steps, begin = resumable._steps, time.perf_counter()

    def ended(step: str) -> None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        if args.within:
            spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in within.items())
            within.clear()
            step = f"{step}: {spent}"
        peaks = f"{mx.get_peak_memory() / 1e9:.2f} | {resident / 1e9:.2f}"
        print(f"| {step} | {time.perf_counter() - begin:.1f} | {peaks} |", flush=True)

    def choosing(*args: Any, **options: Any) -> Any:
        plan = choose(*args, **options)
        ended("bits chosen")
        return plan

    def noted(*args: Any) -> Iterator[Any]:
        for step in steps(*args):

            def quantize(step: Any = step) -> Any:
                tensors = step.quantize()
                ended(step.names[0].removesuffix(".weight"))
                return tensors

            yield step._replace(quantize=quantize)

    with (
        mock.patch("convert.calibration_texts._WRITES_BY_DEFAULT", {True: False, False: False}),
        mock.patch("convert.preparing.choose", choosing),
        mock.patch.object(resumable, "_steps", noted),
    ):
        convert(source, dest, bits=4, calibrate=True)
    ended("all")


if __name__ == "__main__":
    main()

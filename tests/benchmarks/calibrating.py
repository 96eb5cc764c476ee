"""Time and peak memory of calibrating at the 7B's or 32B's shape, step by step.

    python tests/benchmarks/calibrating.py [--shape 7b|32b] [--layers N] [--folder DIR]

Converts a checkpoint of random weights with N of its layers (2.05 GB with one of the 7B's, 3.03 with one of
the 32B's) with `calibrate=True`.
Prints when each step ended, with the peak so far of MLX's memory and of the whole process.
"""

import argparse
import importlib.metadata
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from converting import checkpoint

from convert import convert
from convert.calibration import resumable
from convert.calibration.sensitivity import choose


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=("7b", "32b"), default="7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "converting")
    args = parser.parse_args()
    source, dest = args.folder / f"{args.shape}-{args.layers}", args.folder / "calibrated"
    # In a process of its own: what this one had in memory would count.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        other.submit(checkpoint, source, args.shape, args.layers).result()
    shutil.rmtree(dest, ignore_errors=True)
    print("mlx", importlib.metadata.version("mlx"), mx.default_device(), "\n")
    print("| step | ended after, s | MLX's peak, GB | the process's, GB |\n|---|---|---|---|")
    steps, begin = resumable._steps, time.perf_counter()

    def ended(step: str) -> None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        peaks = f"{mx.get_peak_memory() / 1e9:.2f} | {resident / 1e9:.2f}"
        print(f"| {step} | {time.perf_counter() - begin:.1f} | {peaks} |", flush=True)

    def choosing(*args: Any, **options: Any) -> Any:
        plan = choose(*args, **options)
        ended("bits chosen")
        return plan

    def timed(*args: Any) -> Iterator[Any]:
        for step in steps(*args):

            def quantize(step: Any = step) -> Any:
                tensors = step.quantize()
                ended(step.names[0].removesuffix(".weight"))
                return tensors

            yield step._replace(quantize=quantize)

    with mock.patch("convert.preparing.choose", choosing), mock.patch.object(resumable, "_steps", timed):
        convert(source, dest, bits=4, calibrate=True)
    ended("all")


if __name__ == "__main__":
    main()

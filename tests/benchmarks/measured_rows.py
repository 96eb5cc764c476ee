"""Rows of measurements in a file of JSON lines, and a pool of short processes that measure them.

Each row is written as soon as it is measured, by the process that measured it, so that a run that is cut
short loses only what it was at.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import mlx.core as mx

Row = dict[str, Any]

# Float32 means float32: TF32 would be as large as what 8 bits cost.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "2",
    "OMP_NUM_THREADS": "2",
    "MLX_ENABLE_TF32": "0",
    "HF_HUB_OFFLINE": "1",
}


class Job(NamedTuple):
    """One process: a checkpoint, a method by its name, and the names of the rows that it is to write."""

    checkpoint: str
    method: str
    rows: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser, checkpoints: Sequence[str]) -> None:
    """The options that benchmarks of rows share."""
    shared = Path(__file__).parents[3] / "shared"
    parser.add_argument("--checkpoint", nargs="+", default=list(checkpoints), help="folders' names in lab/")
    parser.add_argument("--method", nargs="+", help="only those whose names begin so")
    parser.add_argument("--shared", type=Path, default=shared, help="where lab/ and text/ lie")
    parser.add_argument("--rows", type=Path, required=True, help="file of JSON lines, one a measurement")
    parser.add_argument("--resume", action="store_true", help="measure only what the file does not have")
    parser.add_argument("--gpus", type=int, default=0, help="share the work out among so many")
    parser.add_argument("--per-gpu", type=int, default=1, help="processes at a time on each")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables of the rows")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)  # checkpoint and method, in a worker


def read(file: Path) -> list[Row]:
    """All rows, the last of those with the same checkpoint and name."""
    found: dict[tuple[str, str], Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # what a process was writing when it was stopped
            continue
        found[row["checkpoint"], row["name"]] = row
    return list(found.values())


def add(file: Path, row: Row) -> None:
    """Append a row in one write, as other processes write to the same file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(row) + "\n").encode())
    finally:
        os.close(descriptor)


def machine() -> Row:
    """What measured a row, and the most memory that it took, in GB."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "device": str(mx.device_info().get("device_name") or mx.default_device().type.name),
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
        "python": platform.python_version(),
        "peak_gb": round(max(resident, mx.get_peak_memory()) / 1e9, 3),
    }


def jobs(args: argparse.Namespace, rows: Mapping[str, tuple[str, ...]]) -> list[Job]:
    """The jobs that the options ask for; `rows` are the names of the rows that each method writes."""
    chosen = tuple(args.method or [""])
    return [
        Job(checkpoint, method, names)
        for checkpoint in args.checkpoint
        for method, names in rows.items()
        if method.startswith(chosen)
    ]


def measure(args: argparse.Namespace, jobs: Sequence[Job], whole: Callable[[Row], bool] = bool) -> int:
    """Run the jobs whose rows the file has not, or has but not `whole`; the number of those that failed. The
    script that runs is called again for each, with the same options and `--here`.
    """
    if args.rows.exists() and not args.resume:
        sys.exit(f"{args.rows} is there already: give --resume to go on with it, or another file")
    there = {(row["checkpoint"], row["name"]) for row in read(args.rows) if whole(row)}
    left = [job for job in jobs if any((job.checkpoint, row) not in there for row in job.rows)]
    waiting: SimpleQueue[Job] = SimpleQueue()
    for job in left:
        waiting.put(job)
    failed: list[Job] = []
    ended: list[Job] = []

    def work(gpu: int | None) -> None:
        chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
        while True:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            began = time.perf_counter()
            command = [sys.executable, *sys.argv, "--here", job.checkpoint, job.method]
            environment = {**_ENVIRONMENT, **os.environ, **chosen}
            done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            ended.append(job)
            said = f"[{len(ended)}/{len(left)}] {job.checkpoint} {job.method}: "
            said += f"{time.perf_counter() - began:.0f} s"
            if done.returncode:
                failed.append(job)
                reason = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
                said += f", FAILED: {reason}"
            print(said, file=sys.stderr, flush=True)

    gpus: list[int | None] = [gpu for _ in range(args.per_gpu) for gpu in range(args.gpus)]
    gpus = gpus or [None]
    threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)

"""Time and peak memory of converting to 4 bits, beside mlx-lm: whole processes, in alternating rounds.

    python tests/benchmarks/converting.py [--rounds N] [--layers N ...] [--shape half|7b] [--folder DIR]

Writes checkpoints of random weights in bfloat16 into DIR: of half the 7B's width (2.04 GB with 12
layers), or of its own shape (14.6 GB with 32). Prints seconds, peak resident memory and their ratios.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from olmo3_mlx import Olmo3, Olmo3Config
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.published import SIZES

HALF = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Run(NamedTuple):
    """Wall time in s, peak resident bytes."""

    seconds: float
    peak: int


def checkpoint(folder: Path, shape: str, layers: int) -> None:
    """A checkpoint of random weights, one file a layer."""
    if folder.exists():
        return
    config = {**SIZES["7b"], **SIZES.get(shape, HALF), "num_hidden_layers": layers, "dtype": "bfloat16"}
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    tensors = Olmo3(Olmo3Config.from_dict(config)).tensors()
    files: dict[str, list[str]] = {}
    for name in tensors:
        files.setdefault(name.split(".")[2] if ".layers." in name else name.split(".")[-2], []).append(name)
    for number, names in enumerate(files.values(), start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        held = {n: tensors.pop(n).astype(mx.bfloat16) for n in names}
        mx.save_safetensors(str(folder / file), held, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        if (DEMO / name).is_file():
            shutil.copy(DEMO / name, folder / name)


def run(command: list[str]) -> Run:
    """One process, its own time and memory."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: {errors.decode()}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Run(time.perf_counter() - begin, usage.ru_maxrss * scale)


def ours(source: Path, dest: Path) -> Run:
    return run([sys.executable, "-m", "convert", str(source), str(dest), "--bits", "4", "--no-card"])


def theirs(source: Path, dest: Path) -> Run:
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(dest)]
    return run([*command, "-q"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--shape", choices=("half", "7b"), default="half")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "converting")
    args = parser.parse_args()
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm")), "\n")
    print("| layers | source, GB | seconds, ours and mlx-lm | ratio | peak, GB, ours and mlx-lm | ratio |")
    print("|---|---|---|---|---|---|")
    for layers in args.layers:
        source = args.folder / f"{args.shape}-{layers}"
        # In a process of its own: what this one had in memory would count as its children's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
            other.submit(checkpoint, source, args.shape, layers).result()
        rounds = []
        for number in range(args.rounds):
            dests = [args.folder / name for name in ("ours", "theirs")]
            for dest in dests:
                shutil.rmtree(dest, ignore_errors=True)
            calls = [(ours, dests[0]), (theirs, dests[1])]
            done = {call: call(source, dest) for call, dest in (calls if number % 2 == 0 else calls[::-1])}
            rounds.append((done[ours], done[theirs]))
        size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
        print(row(layers, size, rounds), flush=True)


def row(layers: int, size: float, rounds: list[tuple[Run, Run]]) -> str:
    cells = [str(layers), f"{size:.2f}"]
    for key, scale in (("seconds", 1.0), ("peak", 1e9)):
        mine, peer = ([getattr(pair[side], key) / scale for pair in rounds] for side in (0, 1))
        ratios = [a / b for a, b in zip(mine, peer, strict=True)]
        cells.append(f"{statistics.median(mine):.2f} and {statistics.median(peer):.2f}")
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()

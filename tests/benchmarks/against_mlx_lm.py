"""The figures of BENCHMARKS.md: this project beside mlx-lm in the same run, on the demo checkpoint.

    make bench            or: python tests/benchmarks/against_mlx_lm.py [--rounds N]

Times are ratios, taken in alternating rounds, as the machine may be shared: the median of the
rounds' ratios, and their range. The bfloat16 and exactness rows need ../shared and are left out
without it.
"""

import argparse
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from olmo3_mlx import generate, load
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.generation.loop import decode, prefill
from olmo3_mlx.generation.sampling import Sampler, SamplingOptions

SHARED = Path(__file__).parents[3] / "shared"
QUESTION = "What is 17 + 25?"
STORY = "Once upon a time there was"
BIN = Path(sys.executable).parent


def wall(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - begin


def cold_start(rounds: int) -> list[float]:
    """Whole process: our wall time over mlx-lm's."""
    end = ["--max-tokens", "20"]
    ours = [str(BIN / "olmo3"), "generate", QUESTION, "--model", str(DEMO), *end]
    theirs = [str(BIN / "mlx_lm.generate"), "--model", str(DEMO), "--prompt", QUESTION, *end]
    wall(ours), wall(theirs)  # bytecode and disk caches
    return [wall(ours) / wall(theirs) for _ in range(rounds)]


def decoding(folder: Path, rounds: int, tokens: int) -> list[float]:
    """Our generated tokens/s over mlx-lm's: same checkpoint, prompt and number of tokens, greedy."""
    from mlx_lm import load as load_theirs
    from mlx_lm import stream_generate

    model, tokenizer = load(folder)
    their_model, their_tokenizer = load_theirs(str(folder))[:2]
    their_tokenizer.eos_token_ids = set()  # run to the end
    model.generation_config = type(model.generation_config)()

    def ours() -> float:
        return generate(model, tokenizer, STORY, raw=True, max_tokens=tokens, temperature=0).generation_tps

    def theirs() -> float:
        prompt = their_tokenizer.encode(STORY)
        *_, last = stream_generate(their_model, their_tokenizer, prompt, max_tokens=tokens)
        return float(last.generation_tps)

    return alternating(ours, theirs, rounds)


def alternating(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> list[float]:
    ours(), theirs()
    return [ours() / theirs() for _ in range(rounds)]


def exactness(name: str) -> dict[str, Any]:
    """Relative error of the logits over 1,500 tokens, and greedy ids, against transformers 4.57.6."""
    golden = np.load(SHARED / "golden" / f"{name}.npz")
    model, _ = load(SHARED / "lab" / name, dtype="float32")
    logits = np.array(model(mx.array(golden["ids"])[None]))[0, golden["positions"]]
    error = np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max()
    prompt, greedy = golden["ids"][: int(golden["prompt_length"])].tolist(), golden["greedy"].tolist()
    equal = {}
    for chunk in (2048, 128, 37):
        caches = model.make_caches()
        start = prefill(model, prompt, caches, chunk=chunk)
        found = list(decode(model, start, caches, Sampler(SamplingOptions()), len(greedy)))
        equal[chunk] = sum(a == b for a, b in zip(found, greedy, strict=True))
    return {"error": float(error), "equal": equal, "of": len(greedy)}


def spread(values: list[float], digits: int = 2) -> str:
    return (
        f"{statistics.median(values):.{digits}f} | {min(values):.{digits}f} to {max(values):.{digits}f}"
        f" | {len(values)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm"))
    print(f"{platform.platform()}, Python {platform.python_version()}, {versions}, {mx.default_device()}\n")
    print("| ours against mlx-lm | median | range | rounds |\n|---|---|---|---|")
    print(f"| cold `generate`, wall time, 4-bit demo | {spread(cold_start(rounds))} |", flush=True)
    print(f"| decoding, tokens/s, 4-bit demo | {spread(decoding(DEMO, rounds, 64))} |", flush=True)
    if not SHARED.is_dir():
        return
    lab = SHARED / "lab" / "olmo3-lab-chat"
    print(f"| decoding, tokens/s, bfloat16 | {spread(decoding(lab, rounds, 128))} |\n", flush=True)
    for name in ("olmo3-lab-chat", "olmo3-lab-gqa"):
        found = exactness(name)
        ids = ", ".join(f"{n} of {found['of']} (chunk {chunk})" for chunk, n in found["equal"].items())
        print(
            f"- {name}, float32: logits within {found['error']:.1e} of the largest; greedy ids equal: {ids}"
        )


if __name__ == "__main__":
    main()

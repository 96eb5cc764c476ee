"""Decoding and prefill at the 7B's shape (random weights, 4-bit) beside mlx-lm, on a GPU.

    python tests/benchmarks/decode_7b_on_gpu.py [--rounds N] [--prompt TOKENS]

Needs about 40 GB of GPU memory while the weights are made. Prints ratios of tokens/s, taken in
alternating rounds.
"""

import argparse
import importlib.metadata
import statistics
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import olmo3 as theirs

from olmo3_mlx import Olmo3, Olmo3Config
from olmo3_mlx.generation import decode, prefill
from olmo3_mlx.published import SIZES
from olmo3_mlx.sampling import Sampler, SamplingOptions


def models() -> tuple[Olmo3, Any]:
    """Ours and mlx-lm's, with the same weights."""
    data = SIZES["7b"]
    ours = Olmo3(Olmo3Config.from_dict(data))
    ours.set_dtype(mx.bfloat16)
    nn.quantize(ours, group_size=64, bits=4)
    for layer in ours.model.layers:
        mx.eval(layer.parameters())
    mx.eval(ours.parameters())
    other = theirs.Model(theirs.ModelArgs.from_dict(data))
    other.set_dtype(mx.bfloat16)
    nn.quantize(other, group_size=64, bits=4)
    other.load_weights(list(ours.tensors().items()))
    return ours, other


def run_ours(model: Olmo3, prompt: list[int], count: int) -> tuple[float, float]:
    """(prompt tokens/s, generated tokens/s)."""
    caches = model.make_caches()
    begin = time.perf_counter()
    logits = prefill(model, prompt, caches)
    tokens = decode(model, logits, caches, Sampler(SamplingOptions()), count)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return len(prompt) / (first - begin), (count - 1) / (time.perf_counter() - first)


def run_theirs(model: Any, prompt: list[int], count: int) -> tuple[float, float]:
    begin = time.perf_counter()
    tokens = generate_step(mx.array(prompt), model, max_tokens=count)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return len(prompt) / (first - begin), (count - 1) / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 512, 4096])
    args = parser.parse_args()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm"))
    print(f"{mx.device_info().get('device_name')}, {versions}\n")
    print("| prompt | prefill, ours / mlx-lm | decoding, ours / mlx-lm | ours, tokens/s |\n|---|---|---|---|")
    ours, other = models()
    for length in args.prompt:
        prompt = [(7 * i) % 100_000 for i in range(length)]
        run_ours(ours, prompt, 8), run_theirs(other, prompt, 8)
        rounds = [(run_ours(ours, prompt, 128), run_theirs(other, prompt, 128)) for _ in range(args.rounds)]
        cells = []
        for i in (0, 1):
            ratios = [a[i] / b[i] for a, b in rounds]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        speeds = [f"{statistics.median(a[i] for a, _ in rounds):.0f}" for i in (0, 1)]
        print(f"| {length} | {cells[0]} | {cells[1]} | {speeds[0]}, {speeds[1]} |", flush=True)


if __name__ == "__main__":
    main()

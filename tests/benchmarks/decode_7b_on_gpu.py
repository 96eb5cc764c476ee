"""Decoding and prefill at the 7B's shape (random weights, 4-bit) beside mlx-lm, on a GPU, with caches
in bfloat16, 8 and 4 bits (mlx-lm's, which cannot be quantized for Olmo 3, always in bfloat16).

    python tests/benchmarks/decode_7b_on_gpu.py [--rounds N] [--prompt TOKENS ...] [--kv-bits 0 8 4]

Needs about 40 GB of GPU memory while the weights are made. Prints ratios of tokens/s, taken in
alternating rounds, and peak memory.
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import olmo3 as theirs
from mlx_lm.models.cache import make_prompt_cache

from olmo3_mlx import Olmo3, Olmo3Config
from olmo3_mlx.generation.loop import decode, prefill
from olmo3_mlx.generation.sampling import Sampler, SamplingOptions
from olmo3_mlx.published import SIZES


class Run(NamedTuple):
    """Tokens/s of the prompt and of what was generated, peak bytes of the prefill, bytes of the caches."""

    prefill: float
    decoding: float
    peak: int
    cache_bytes: int


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


def run_ours(model: Olmo3, prompt: list[int], count: int, kv_bits: int, group: int | None) -> Run:
    caches = model.make_caches(kv_bits=kv_bits or None, kv_group_size=group)
    begin = time.perf_counter()
    logits = prefill(model, prompt, caches)
    tokens = decode(model, logits, caches, Sampler(SamplingOptions()), count)
    return timed(tokens, begin, len(prompt), count, caches)


def run_theirs(model: Any, prompt: list[int], count: int) -> Run:
    caches = make_prompt_cache(model)
    begin = time.perf_counter()
    tokens = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=caches)
    return timed(tokens, begin, len(prompt), count, caches)


def timed(tokens: Iterator[Any], begin: float, length: int, count: int, caches: list[Any]) -> Run:
    next(tokens)
    first = time.perf_counter()
    prefill_peak = mx.get_peak_memory()
    for _ in tokens:
        pass
    seconds = time.perf_counter() - first
    return Run(length / (first - begin), (count - 1) / seconds, prefill_peak, sum(c.nbytes for c in caches))


def pair(mine: Callable[..., Run], peer: Callable[..., Run], count: int, mine_first: bool) -> tuple[Run, Run]:
    """Both, one after the other, in either order: the machine's speed drifts."""
    runs = {run: measured(run, count) for run in ((mine, peer) if mine_first else (peer, mine))}
    return runs[mine], runs[peer]


def measured(run: Callable[..., Run], count: int) -> Run:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return run(count=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--kv-bits", type=int, nargs="+", default=[0, 8, 4], help="0: not quantized")
    parser.add_argument("--kv-group-size", type=int)
    args = parser.parse_args()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm"))
    print(f"{mx.device_info().get('device_name')}, {versions}\n")
    print(
        "| prompt | caches | prefill, ours / mlx-lm | decoding, ours / mlx-lm | tokens/s (prefill, decoding)"
        " | peak of the prefill, ours and mlx-lm, GB | caches, GiB |\n|---|---|---|---|---|---|---|"
    )
    ours, other = models()
    for bits in args.kv_bits:
        for length in args.prompt:
            prompt = [(7 * i) % 100_000 for i in range(length)]
            mine = partial(run_ours, ours, prompt, kv_bits=bits, group=args.kv_group_size)
            peer = partial(run_theirs, other, prompt)
            measured(peer, 8), measured(mine, 8)
            rounds = [pair(mine, peer, args.tokens, number % 2 == 0) for number in range(args.rounds)]
            print(row(length, bits, rounds), flush=True)


def row(length: int, bits: int, rounds: list[tuple[Run, Run]]) -> str:
    cells = [str(length), f"{bits} bits" if bits else "bfloat16"]
    for key in ("prefill", "decoding"):
        ratios = [getattr(a, key) / getattr(b, key) for a, b in rounds]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    cells.append(", ".join(f"{statistics.median(getattr(a, k) for a, _ in rounds):.0f}"
                           for k in ("prefill", "decoding")))  # fmt: skip
    cells.append(f"{max(a.peak for a, _ in rounds) / 1e9:.1f} and {max(b.peak for _, b in rounds) / 1e9:.1f}")
    cells.append(f"{rounds[0][0].cache_bytes / 2**30:.2f}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()

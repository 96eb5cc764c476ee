"""Two forms of a rotating cache at a decoding step: a buffer that is compacted, attended to without a
mask, and a ring that is written round and round, whose slack a mask has to hide.

    python tests/benchmarks/ring_or_buffer.py [--heads 32] [--window 4096] [--rewind 512]

Both hold window + rewind positions. Times are of one layer's attention, `--steps` of them in a row.
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from olmo3_mlx.caches.rotating import SLACK

Step = Callable[[mx.array], mx.array]


def seconds(step: Step, query: mx.array, steps: int) -> float:
    """One step's time, each fed with what the one before gave."""
    begin = time.perf_counter()
    for _ in range(steps):
        query = step(query)
    mx.eval(query)
    return (time.perf_counter() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--rewind", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    held = args.window + args.rewind
    query = mx.random.normal((1, args.heads, 1, args.dim)).astype(mx.bfloat16)
    keys, values = (
        mx.random.normal((1, args.heads, held + SLACK, args.dim)).astype(mx.bfloat16) for _ in "kv"
    )
    visible = (mx.arange(held) + 1000) % held < args.window
    mx.eval(query, keys, values, visible)
    attend = mx.fast.scaled_dot_product_attention

    def buffer(q: mx.array) -> mx.array:
        span = slice(held - args.window + 60, held + 60)
        return attend(q, keys[:, :, span], values[:, :, span], scale=0.1)

    def ring(q: mx.array) -> mx.array:
        return attend(q, keys[:, :, :held], values[:, :, :held], scale=0.1, mask=visible)

    def compaction(q: mx.array) -> mx.array:
        kept = [mx.concatenate([a[:, :, SLACK:], a[:, :, :SLACK]], axis=2) for a in (keys, values)]
        mx.eval(kept)
        return q

    times: dict[str, list[float]] = {"buffer": [], "ring": [], "compaction": []}
    for number in range(args.rounds + 1):
        for step in (buffer, ring, compaction):
            took = seconds(step, query, args.steps)
            if number:  # the first one warms up
                times[step.__name__].append(took * 1e3)
    device = mx.device_info().get("device_name", "CPU")
    print(f"{device}, mlx {importlib.metadata.version('mlx')}, {args.rounds} rounds, milliseconds a layer")
    for name, all_ in times.items():
        print(f"{name:12s} {statistics.median(all_):.4f} ({min(all_):.4f} to {max(all_):.4f})")
    each = [a + b / SLACK for a, b in zip(times["buffer"], times["compaction"], strict=True)]
    ratios = [r / b for r, b in zip(times["ring"], each, strict=True)]
    print(f"ring / (buffer with a compaction every {SLACK} steps): {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()

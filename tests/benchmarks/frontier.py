"""What quantizing costs at every size, kind of text by kind: rounded, calibrated, and by mlx-lm's methods.

    python tests/benchmarks/frontier.py --rows FILE [--resume] [--shared DIR] [--gpus N [--per-gpu M]]
        [--checkpoint NAME ...] [--method NAME ...] [--left-out KIND ...] [--extra FILE]
        [--written DIR]
    python tests/benchmarks/frontier.py --rows FILE --table [--picture FILE.png]

A row is a method at a size: bits per weight, and on each kind of text (texts_by_kind.py) the KL divergence
from the original, the perplexity and how often both find the same token likeliest. Both are computed in
float32, ours converts as `olmo3 convert` does. It calibrates by default on the texts that come along, none of
which is measured on, and on text that the model writes itself; mlx-lm's methods
(learned_quants_of_mlx_lm.py) read all of the texts that come along.
`--left-out novels` calibrates once more without the texts of that kind; `--extra` measures one more text.
Each checkpoint and method is a process of its own. Needs ../shared, or `--shared`.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measured_rows
import mlx.core as mx
from frontier_tables import picture, print_tables
from measured_rows import Job, Row
from texts_by_kind import KINDS, spans
from ways_of_quantizing import (
    DWQ,
    GPTQ,
    LEFT_OUT,
    PAIRS,
    RECIPES,
    SIZE_OF_4_BITS,
    calibrated,
    dynamic,
    dynamic_row,
    dynamic_targets,
    quantize,
    rounding,
)

from olmo3_mlx import Olmo3, load

CHECKPOINTS = ("olmo3-lab-chat", "olmo3-lab-gqa", "olmo3-lab-wide")
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (64, 32, 128)
TARGETS = (2.5, 3, 3.3, 3.6, 3.8, 4, 4.25, SIZE_OF_4_BITS, 4.9, 5.5, 6, 7, 8)


def jobs(args: argparse.Namespace) -> list[Job]:
    """All that there is to measure: a job of dynamic_quant has a row for each size."""
    methods: dict[str, tuple[str, ...]] = {DWQ: (), GPTQ: ()}  # which take longest
    methods |= {rounding(bits, group): () for group in GROUP_SIZES for bits in BITS}
    methods |= dict.fromkeys(RECIPES, ())
    methods |= {calibrated(target): () for target in TARGETS}
    methods |= {calibrated(SIZE_OF_4_BITS, kind): () for kind in args.left_out}
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in methods}
    for pair in PAIRS:
        rows[dynamic(*pair)] = tuple(dynamic_row(*pair, target) for target in dynamic_targets(*pair, TARGETS))
    return measured_rows.jobs(args, rows)


def log_probabilities(model: Olmo3, sequence: mx.array) -> mx.array:
    """Those of every next token [L, V]."""
    logits = model(sequence[None])[0]
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def figures(sequence: mx.array, reference: mx.array, other: mx.array) -> tuple[float, float, float]:
    """KL divergence, loss, and the share of positions where both have the same likeliest token."""
    kl = (mx.exp(reference) * (reference - other)).sum(-1).mean()
    loss = -mx.take_along_axis(other[:-1], sequence[1:, None], axis=-1).mean()
    same = (mx.argmax(reference, axis=-1) == mx.argmax(other, axis=-1)).mean()
    return float(kl), float(loss), float(same)


def by_kind(
    model: Olmo3, texts: Mapping[str, mx.array], references: Mapping[str, Sequence[mx.array]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of each kind, and the KL of each of its sequences."""
    for kind, sequences in texts.items():
        found = [
            figures(sequence, reference, log_probabilities(model, sequence))
            for sequence, reference in zip(sequences, references[kind], strict=True)
        ]
        kl, loss, same = ([each[i] for each in found] for i in range(3))
        yield (
            kind,
            {
                "kl": sum(kl) / len(kl),
                "perplexity": math.exp(sum(loss) / len(loss)),
                "same_token": sum(same) / len(same),
                "kl_of_sequences": kl,
            },
        )


def measure(args: argparse.Namespace, checkpoint: str, method: str) -> None:
    """Quantize in this process, and write a row for each result."""
    folder = args.shared / "lab" / checkpoint
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    texts = spans(args.shared, tokenizer, args.extra)
    references = {kind: [log_probabilities(model, s) for s in texts[kind]] for kind in texts}
    for result in quantize(folder, method, TARGETS, args.written):
        model.load_weights(list(result.tensors.items()))
        row: Row = {
            "checkpoint": checkpoint,
            "name": result.name,
            "bits_per_weight": result.bits,
            "kinds": dict(by_kind(model, texts, references)),
            "seconds": round(result.seconds, 2),
            "tokens": result.tokens,
            **measured_rows.machine(),
        }
        measured_rows.add(args.rows, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    measured_rows.add_options(parser, CHECKPOINTS)
    parser.add_argument("--left-out", nargs="+", default=[], choices=list(LEFT_OUT), metavar="KIND")
    parser.add_argument("--extra", type=Path, help="one more text to measure on, .txt or .jsonl")
    parser.add_argument("--written", type=Path, help="folder that keeps what checkpoints write themselves")
    parser.add_argument("--picture", type=Path, help="with --table: where to draw the rows, as a PNG")
    args = parser.parse_args()
    if args.here:
        measure(args, *args.here)
        return
    if args.table:
        rows = measured_rows.read(args.rows)
        print_tables(rows)
        if args.picture:
            args.picture.write_bytes(picture(rows))
        return
    wanted = {*KINDS, args.extra.name} if args.extra else set(KINDS)
    sys.exit(min(1, measured_rows.measure(args, jobs(args), lambda row: wanted <= row["kinds"].keys())))


if __name__ == "__main__":
    main()

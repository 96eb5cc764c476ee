"""What quantizing costs in quality, rounded and calibrated: bits a weight, KL divergence, perplexity.

    python tests/benchmarks/calibrated_quality.py [--checkpoint NAME ...] [--text shipped novels]

Converts as `olmo3 convert` does: by rounding, with `--calibrate` at the same size, with `--target-bpw 4.9`;
calibrated on the text that comes along, or on what follows character 100,000 of two novels. Evaluated in
float32 on 1,024 tokens from character 20,000 of each novel, and on three such spans further on. Those after
character 100,000 are left out of what is calibrated on. Needs ../shared; minutes a row on a slow CPU.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert import convert
from convert.reading.source import Source
from convert.reading.stored import read
from olmo3_mlx import Olmo3, Tokenizer, load

SHARED = Path(__file__).parents[3] / "shared"
CHECKPOINTS = ("olmo3-lab-chat", "olmo3-lab-gqa")
TEXTS = ("wuthering_heights", "treasure_island")
STARTS = {  # characters; the first of each is the one that is reported by itself
    "wuthering_heights": (20_000, 60_000, 300_000, 500_000),
    "treasure_island": (20_000, 60_000, 240_000, 280_000),
}
LENGTH = 1024
CALIBRATED_FROM = 100_000


def novel(name: str) -> str:
    return (SHARED / "text" / f"{name}.txt").read_text(encoding="utf-8")


def tokens_from(tokenizer: Tokenizer, name: str, start: int, count: int) -> list[int]:
    """`count` ids of a novel from a character on."""
    ids = tokenizer.encode(novel(name)[start : start + 8 * count])
    assert len(ids) >= count, name
    return ids[:count]


def unseen_by(name: str) -> str:
    """What to calibrate on of a novel: its end, without the spans evaluated on."""
    text, parts, at = novel(name), [], CALIBRATED_FROM
    for start in STARTS[name]:
        if start >= at:
            parts.append(text[at:start])
            at = start + 8 * LENGTH
    return "\n".join([*parts, text[at:]])


def evaluate(model: Olmo3, texts: list[mx.array]) -> list[mx.array]:
    """Log-probabilities of each text [1, L, V]."""
    found = []
    for text in texts:
        logits = model(text)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found[-1])
    return found


def kl_and_perplexity(text: mx.array, reference: mx.array, other: mx.array) -> tuple[float, float]:
    kl = (mx.exp(reference) * (reference - other)).sum(-1).mean()
    loss = -mx.take_along_axis(other[:, :-1], text[:, 1:, None], axis=-1).mean()
    return float(kl), math.exp(float(loss))


def measure(name: str, calibrations: dict[str, bool | Path], folder: Path) -> None:
    """Print a row for each way of quantizing one checkpoint."""
    source = SHARED / "lab" / name
    model, tokenizer = load(source)
    model.set_dtype(mx.float32)
    spans = [(text, place) for place in range(4) for text in TEXTS]
    texts = [mx.array([tokens_from(tokenizer, text, STARTS[text][i], LENGTH)]) for text, i in spans]
    reference = evaluate(model, texts)
    plain = np.ones(len(spans))

    def row(method: str, **options: Any) -> None:
        nonlocal plain
        report = convert(source, folder / f"{name} {method}", **options)
        tensors = Source.open(folder / f"{name} {method}").tensors
        model.load_weights([(path, read(tensor).astype(mx.float32)) for path, tensor in tensors.items()])
        found = [
            kl_and_perplexity(*each) for each in zip(texts, reference, evaluate(model, texts), strict=True)
        ]
        kl = np.array([kl for kl, _ in found])
        plain = kl if method == "rounded" else plain
        cells = [f"{kl[i]:.4f} ({kl[i] / plain[i]:.2f}) | {found[i][1]:.2f}" for i in (0, 1)]
        others = kl[2:] / plain[2:]
        cells.append(f"{kl[2:].mean():.4f} ({others.mean():.2f}; {others.min():.2f} to {others.max():.2f})")
        figures = f"{report.bits_per_weight:.3f} | {' | '.join(cells)} | {report.seconds:.0f}"
        print(f"| {name} | {method} | {figures} |", flush=True)

    row("rounded")
    for label, text in calibrations.items():
        row(f"calibrated on {label}", calibrate=text)
        row(f"calibrated on {label}, target 4.9", calibrate=text, target_bpw=4.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", nargs="+", default=list(CHECKPOINTS), choices=CHECKPOINTS)
    parser.add_argument("--text", nargs="+", default=["shipped", "novels"], choices=["shipped", "novels"])
    args = parser.parse_args()
    print("| checkpoint | how | bits | Wuthering, KL | perplexity | Treasure, KL | perplexity | others | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        novels = Path(folder) / "novels.txt"
        novels.write_text("\n".join(map(unseen_by, TEXTS)), encoding="utf-8")
        texts: dict[str, bool | Path] = {"shipped": True, "novels": novels}
        for name in args.checkpoint:
            measure(name, {label: texts[label] for label in args.text}, Path(folder))


if __name__ == "__main__":
    main()

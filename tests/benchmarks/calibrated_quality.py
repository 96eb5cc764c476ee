"""What quantizing costs in quality, rounded and calibrated: bits a weight, KL divergence, perplexity.

    python tests/benchmarks/calibrated_quality.py [--checkpoint NAME ...] [--target BPW ...] [--texts N]

Evaluated in float32 on 1,024 tokens from character 20,000 of each of two novels; calibrated on other
parts of them, from character 100,000. Needs ../shared; takes some minutes a row on a slow CPU.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from convert.calibration.blocks import Calibration
from convert.calibration.sensitivity import allocate, costs
from convert.source import Source
from olmo3_mlx import Olmo3, Tokenizer, load
from olmo3_mlx.quantization import Quantization

SHARED = Path(__file__).parents[3] / "shared"
CHECKPOINTS = ("olmo3-lab-chat", "olmo3-lab-gqa")
TEXTS = ("wuthering_heights", "treasure_island")
LENGTH = 1024


def tokens_from(tokenizer: Tokenizer, name: str, start: int, count: int) -> list[int]:
    """`count` ids of a novel from a character on."""
    text = (SHARED / "text" / f"{name}.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[start : start + 8 * count])
    assert len(ids) >= count, name
    return ids[:count]


def evaluate(model: Olmo3, texts: list[mx.array]) -> list[mx.array]:
    """Log-probabilities of each text [1, L, V]."""
    found = []
    for text in texts:
        logits = model(text)
        found.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(found[-1])
    return found


def kl_and_perplexity(text: mx.array, reference: mx.array, other: mx.array) -> tuple[float, float]:
    kl = (mx.exp(reference) * (reference - other)).sum(-1).mean().item()
    loss = -mx.take_along_axis(other[:, :-1], text[:, 1:, None], axis=-1).mean().item()
    return float(kl), float(np.exp(loss))


def dense(made: Mapping[str, mx.array], plan: Mapping[str, Quantization]) -> dict[str, mx.array]:
    """The weights that quantized tensors stand for, in float32."""
    return {
        f"{path}.weight": mx.dequantize(
            made[f"{path}.weight"],
            made[f"{path}.scales"].astype(mx.float32),
            made[f"{path}.biases"].astype(mx.float32),
            group_size=how.group_size,
            bits=how.bits,
        )
        for path, how in plan.items()
    }


def rounded(original: Mapping[str, mx.array], plan: Mapping[str, Quantization]) -> dict[str, mx.array]:
    made = {}
    for path, how in plan.items():
        weight = original[f"{path}.weight"].astype(mx.bfloat16)
        parts = mx.quantize(weight, group_size=how.group_size, bits=how.bits)
        made |= {f"{path}.{kind}": a for kind, a in zip(("weight", "scales", "biases"), parts, strict=True)}
    return made


def calibrated(source: Source, plan: Mapping[str, Quantization], text: mx.array) -> dict[str, mx.array]:
    calibration = Calibration(source, plan, text)
    made = calibration.embedding()
    for index in range(source.config.num_hidden_layers):
        made |= calibration.block(index)
    return made | calibration.head()


def measure(name: str, targets: list[float], count: int) -> None:
    """Print a row for each way of quantizing one checkpoint."""
    model, tokenizer = load(SHARED / "lab" / name)
    model.set_dtype(mx.float32)
    source, original = Source.open(SHARED / "lab" / name), model.tensors()
    texts = [mx.array([tokens_from(tokenizer, text, 20_000, LENGTH)]) for text in TEXTS]
    reference = evaluate(model, texts)
    parameters = sum(array.size for array in original.values())

    def row(how: str, made: Mapping[str, mx.array], plan: Mapping[str, Quantization], began: float) -> None:
        seconds = time.perf_counter() - began
        size = sum(a.nbytes for a in made.values())
        size += sum(2 * a.size for n, a in original.items() if n not in made)
        model.load_weights(list({**original, **dense(made, plan)}.items()))
        found = [
            kl_and_perplexity(*each) for each in zip(texts, reference, evaluate(model, texts), strict=True)
        ]
        cells = " | ".join(f"{kl:.4f} | {perplexity:.2f}" for kl, perplexity in found)
        print(f"| {name} | {how} | {8 * size / parameters:.3f} | {cells} | {seconds:.0f} |", flush=True)

    row("original", {}, {}, time.perf_counter())
    plain = {n.removesuffix(".weight"): Quantization(4, 64) for n, a in original.items() if a.ndim == 2}
    row("rounded, 4 bits, groups of 64", rounded(original, plain), plain, time.perf_counter())
    parts = [tokens_from(tokenizer, text, 100_000, count // 2 * LENGTH) for text in TEXTS]
    text = mx.array(np.concatenate([np.array(part).reshape(-1, LENGTH) for part in parts]))
    began = time.perf_counter()
    found = costs(source, mx.array(np.array([part[:512] for part in parts])))
    print(f"sensitivities of {name}: {time.perf_counter() - began:.0f} s", flush=True)
    for target in targets:
        began = time.perf_counter()
        plan = allocate(source, found, target)
        row(f"calibrated, target {target}", calibrated(source, plan, text), plan, began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", nargs="+", default=list(CHECKPOINTS), choices=CHECKPOINTS)
    parser.add_argument("--target", nargs="+", type=float, default=[4.5, 4.9])
    parser.add_argument("--texts", type=int, default=16, help="of 1,024 tokens to calibrate on")
    args = parser.parse_args()
    print("| checkpoint | how | bits a weight | KL, Wuthering | perplexity | KL, Treasure | perplexity | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.checkpoint:
        measure(name, args.target, args.texts)


if __name__ == "__main__":
    main()

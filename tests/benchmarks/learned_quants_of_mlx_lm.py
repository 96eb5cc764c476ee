"""What mlx-lm's own ways of quantizing cost in quality: the rows that calibrated_quality.py is held against.

    python tests/benchmarks/learned_quants_of_mlx_lm.py [--checkpoint NAME] [--method NAME] [--samples N]

Evaluated as calibrated_quality.py does, calibrated on the same novels from the same character on. All at
mlx-lm's defaults, except: what comes from the network (the calibration text, dwq's dataset) is made from
the novels; models compute in float32 while they are calibrated, as bfloat16 is many times as slow on a
CPU, and the result is rounded to bfloat16; dwq multiplies with unpacked weights, for speed; `--samples`
and `--length` take less than the defaults (the whole text in samples of 512 tokens for gptq and
dynamic_quant, 2,048 of 1,025 tokens for dwq), and the row says so. A row is a process with a home of its own.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from calibrated_quality import (
    CHECKPOINTS,
    LENGTH,
    SHARED,
    TEXTS,
    evaluate,
    kl_and_perplexity,
    tokens_from,
)
from mlx.utils import tree_flatten
from mlx_lm import load as load_theirs
from mlx_lm.quant import awq, dwq, dynamic_quant, gptq
from mlx_lm.quant.utils import load_data
from mlx_lm.utils import quantize_model

from olmo3_mlx import load
from olmo3_mlx.quantization import Quantization

SEED = 123  # mlx-lm's


class Calibrated(NamedTuple):
    """Quantized tensors by name, and how many tokens they were calibrated on."""

    tensors: dict[str, mx.array]
    tokens: int


def dense(quantized: Mapping[str, mx.array], plan: Mapping[str, Quantization]) -> dict[str, mx.array]:
    """The weights that quantized tensors stand for, in float32."""
    return {
        f"{path}.weight": mx.dequantize(
            quantized[f"{path}.weight"],
            quantized[f"{path}.scales"].astype(mx.float32),
            quantized[f"{path}.biases"].astype(mx.float32),
            group_size=scheme.group_size,
            bits=scheme.bits,
        )
        for path, scheme in plan.items()
    }


def calibration_text() -> str:
    novels = [(SHARED / "text" / f"{name}.txt").read_text(encoding="utf-8") for name in TEXTS]
    return "\n".join(novel[100_000:] for novel in novels)


def in_float32(folder: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    mx.random.seed(SEED)
    loaded: Any = load_theirs(str(folder), return_config=True)
    model, tokenizer, config = loaded
    model.set_dtype(mx.float32)
    return model, tokenizer, config


def tensors_of(model: nn.Module) -> dict[str, mx.array]:
    model.set_dtype(mx.bfloat16)
    tensors = dict(tree_flatten(model.parameters()))
    mx.eval(tensors)
    return tensors


def from_command(main: Callable[[], None], *options: str) -> dict[str, mx.array]:
    """What one of mlx-lm's commands saves."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["mlx_lm", *options, "--mlx-path", f"{folder}/result"]
        main()
        quantized: dict[str, mx.array] = {}
        for file in Path(folder).glob("result/*.safetensors"):
            tensors = mx.load(str(file))
            assert isinstance(tensors, dict)
            quantized |= tensors
        mx.eval(quantized)
    return quantized


def converted(folder: Path, *options: str) -> Calibrated:
    from mlx_lm.convert import main

    return Calibrated(from_command(main, "--hf-path", str(folder), "-q", *options), 0)


def with_gptq(folder: Path, samples: int, length: int) -> Calibrated:
    model, tokenizer, _ = in_float32(folder)
    data = load_data(tokenizer, samples, length)
    model, _ = gptq.gptq_quantize(model, data, 4, 64, fallback_bits=6, fallback_group_size=64)
    return Calibrated(tensors_of(model), data.size)


def with_dynamic_quant(folder: Path, samples: int, length: int) -> Calibrated:
    """Sensitivities in float32; the rest by mlx-lm's command on the bfloat16 checkpoint."""
    model, tokenizer, _ = in_float32(folder)
    data = load_data(tokenizer, samples, length)
    found = dynamic_quant.estimate_sensitivities(model, data, 4, 64, 5, 64)
    file = Path.home() / "sensitivities.json"
    file.write_text(json.dumps(found))
    options = ("--model", str(folder), "--sensitivities", str(file))
    return Calibrated(from_command(dynamic_quant.main, *options), data.size)


def with_dwq(folder: Path, samples: int, length: int) -> Calibrated:
    """Samples are pieces of the novels from random places; few samples are validated on few as well."""

    def unpacked(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
        parts = (layer.weight, layer.scales, layer.biases)
        return x @ mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits).T

    setattr(nn.QuantizedLinear, "__call__", unpacked)  # noqa: B010  (mypy takes it for a mistake)
    np.random.seed(SEED)
    model, tokenizer, config = in_float32(folder)
    student, _, _ = in_float32(folder)
    student.set_dtype(mx.bfloat16)
    quantize_model(student, config, 64, 4)
    student.set_dtype(mx.float32)
    ids = tokenizer.encode(calibration_text())
    samples = 2048 if samples < 0 else samples
    starts = np.random.randint(0, len(ids) - length, samples + min(32, max(4, samples // 8)))
    data = [(ids[start : start + length], 0) for start in starts]
    dwq.dwq_quantize(
        student,
        lambda batch, index, split: model(batch),
        optimizers.Adam(learning_rate=1e-6, bias_correction=True),
        data[:samples],
        data[samples:],
        batch_size=4,
        max_seq_length=length,
        seed=SEED,
        dtype=mx.float32,
    )
    return Calibrated(tensors_of(student), samples * length)


METHODS: dict[str, Callable[[Path, int, int], Calibrated]] = {
    "4-bit": lambda folder, *_: converted(folder),
    "mixed_4_6": lambda folder, *_: converted(folder, "--quant-predicate", "mixed_4_6"),
    "awq": lambda folder, *_: Calibrated(from_command(awq.main, "--model", str(folder)), 0),
    "gptq": with_gptq,
    "dynamic_quant": with_dynamic_quant,
    "dwq": with_dwq,
}
LENGTHS = {"dwq": 1025}  # of a sample; others have 512


def plan_of(quantized: dict[str, mx.array], original: dict[str, mx.array]) -> dict[str, Quantization]:
    """Bits and groups as the shapes say."""
    plan = {}
    for path in (name.removesuffix(".scales") for name in quantized if name.endswith(".scales")):
        columns = original[f"{path}.weight"].shape[1]
        bits = quantized[f"{path}.weight"].shape[1] * 32 // columns
        plan[path] = Quantization(bits, columns // quantized[f"{path}.scales"].shape[1])
    return plan


def measure(name: str, method: str, samples: int, length: int | None) -> None:
    """Quantize here, then print the row."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        quantized = METHODS[method](SHARED / "lab" / name, samples, length or LENGTHS.get(method, 512))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    model, tokenizer = load(SHARED / "lab" / name)
    model.set_dtype(mx.float32)
    original = model.tensors()
    texts = [mx.array([tokens_from(tokenizer, text, 20_000, LENGTH)]) for text in TEXTS]
    reference = evaluate(model, texts)
    plan = plan_of(quantized.tensors, original)
    kept = {n: a.astype(mx.float32) for n, a in quantized.tensors.items() if n.rpartition(".")[0] not in plan}
    model.load_weights(list({**original, **kept, **dense(quantized.tensors, plan)}.items()))
    found = [kl_and_perplexity(*each) for each in zip(texts, reference, evaluate(model, texts), strict=True)]
    bits = 8 * sum(a.nbytes for a in quantized.tensors.values()) / sum(a.size for a in original.values())
    cells = " | ".join(f"{kl:.4f} | {perplexity:.2f}" for kl, perplexity in found)
    way = method
    if quantized.tokens:
        way += f", only {samples} samples" if samples > 0 else ""
        way += f", of only {length} tokens" if length else ""
    end = f"{seconds:.0f} | {peak / 1e9:.2f}"
    print(f"| {name} | {way} | {quantized.tokens:,} | {bits:.3f} | {cells} | {end} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", nargs="+", default=list(CHECKPOINTS), choices=CHECKPOINTS)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--samples", type=int, default=-1, help="at most; -1 for mlx-lm's defaults")
    parser.add_argument("--length", type=int, help="tokens in a sample, where it is not mlx-lm's default")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        measure(args.checkpoint[0], args.method[0], args.samples, args.length)
        return
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mlx", "mlx-lm")), "\n")
    print(
        "| checkpoint | how | calibration tokens | bits a weight | KL, Wuthering | perplexity | KL, Treasure"
        " | perplexity | s | peak, GB |\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in args.checkpoint:
        for method in args.method:
            with tempfile.TemporaryDirectory() as home:
                text = Path(home) / ".cache" / "mlx-lm" / "calibration_v5.txt"
                text.parent.mkdir(parents=True)
                text.write_text(calibration_text(), encoding="utf-8")
                command = [sys.executable, __file__, "--here", "--checkpoint", name, "--method", method]
                environment = {**os.environ, "HOME": home, "HF_HUB_OFFLINE": "1"}
                command += ["--samples", str(args.samples)]
                command += ["--length", str(args.length)] if args.length else []
                done = subprocess.run(
                    command, check=False, env=environment, cwd=home, capture_output=True, text=True
                )
            failed = (
                f"| {name} | {method} | fails: {(done.stderr.strip() or 'no message').splitlines()[-1]} |"
            )
            print(failed if done.returncode else done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()

"""Do transformers and torch find the same distance between two checkpoints as `measure` does?

    python tests/benchmarks/card_against_transformers.py ours ORIGINAL RESULT --out FIGURES
    python tests/benchmarks/card_against_transformers.py theirs FIGURES

`ours` (with this project installed) measures, and writes the tokens, the figures and both checkpoints'
weights, unquantized in float32, to the new folder FIGURES. `theirs` (with torch and transformers, 4.57 or at
least 5.13: versions between apply YaRN to every layer) loads those, computes the same from whole logits in
float64, prints both, and exits 1 if a figure is more than 1 % off.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FIGURES = (
    "kl_mean",
    "kl_median",
    "kl_99",
    "kl_max",
    "agreement",
    "probability_mean",
    "perplexity 1",
    "perplexity 2",
)
TOLERANCE = 0.01
NAMES = ("original", "result")


def ours(args: argparse.Namespace) -> int:
    import mlx.core as mx

    from convert.card.measure import measure
    from convert.reading.source import Source
    from convert.reading.stored import read
    from convert.texts.sequences import as_many_of_each
    from convert.texts.shipped import evaluation_texts
    from olmo3_mlx.text.tokenizer import Tokenizer

    args.out.mkdir()
    sources = [Source.open(args.original), Source.open(args.result)]
    tokenizer = Tokenizer.from_folder(sources[0].folder)
    prose = evaluation_texts(tokenizer)[0].tokenized(tokenizer)
    tokens = as_many_of_each([prose], args.length, args.count).tokens
    for name, source in zip(NAMES, sources, strict=True):
        folder = args.out / name
        folder.mkdir()
        weights = {n: read(tensor).astype(mx.float32) for n, tensor in source.tensors.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        config = {k: v for k, v in source.data.items() if not k.startswith("quantization")}
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    quality = measure(sources[0], sources[1], tokens)
    found = {name: getattr(quality, name) for name in FIGURES if not name.startswith("perplexity")}
    found |= {f"perplexity {i + 1}": quality.perplexity[i] for i in range(2)}
    (args.out / "ours.json").write_text(json.dumps({"tokens": tokens.tolist(), "figures": found}))
    print(json.dumps(found))
    return 0


def theirs(args: argparse.Namespace) -> int:
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    stored = json.loads((args.figures / "ours.json").read_text())
    tokens = torch.tensor(stored["tokens"])
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(
            args.figures / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for name in NAMES
    ]
    kept: dict[str, list[Any]] = {"kl": [], "same": [], "first": [], "second": []}
    for row in tokens:
        with torch.no_grad():
            p, q = (model(row[None]).logits[0, :-1].double().log_softmax(-1) for model in models)
        kept["kl"].append((p.exp() * (p - q)).sum(-1))
        kept["same"].append((p.argmax(-1) == q.argmax(-1)).double())
        for name, x in (("first", p), ("second", q)):
            kept[name].append(x.gather(-1, row[1:, None])[:, 0])
    kl, same, first, second = (torch.cat(parts) for parts in kept.values())
    found = {
        "kl_mean": kl.mean(), "kl_median": kl.quantile(0.5), "kl_99": kl.quantile(0.99), "kl_max": kl.max(),
        "agreement": same.mean(), "probability_mean": (first.exp() - second.exp()).abs().mean(),
        "perplexity 1": (-first.mean()).exp(), "perplexity 2": (-second.mean()).exp(),
    }  # fmt: skip
    worst = 0.0
    for name in FIGURES:
        a, b = stored["figures"][name], float(found[name])
        off = abs(a - b) / b
        worst = max(worst, off)
        print(f"{name:<18} ours {a:12.6f}   transformers {b:12.6f}   off by {off:.2e}")
    return int(worst > TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sides = parser.add_subparsers(required=True)
    side = sides.add_parser("ours")
    side.add_argument("original")
    side.add_argument("result")
    side.add_argument("--out", type=Path, required=True)
    side.add_argument("--length", type=int, default=384)
    side.add_argument("--count", type=int, default=2)
    side.set_defaults(run=ours)
    side = sides.add_parser("theirs")
    side.add_argument("figures", type=Path)
    side.set_defaults(run=theirs)
    args = parser.parse_args()
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""olmo3 inspect: the architecture at a glance, and the memory it takes."""

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from olmo3_mlx.checkpoint import load_config
from olmo3_mlx.cli.options import add_model
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config, RopeConfig
from olmo3_mlx.errors import OptionError
from olmo3_mlx.hub import resolve
from olmo3_mlx.memory import cache_bytes, layer_counts, machine_bytes, parameters_by_part, weight_bytes
from olmo3_mlx.published import SIZES

_CONTEXTS = (4096, 16384, 65536)
_PRECISIONS: dict[str, int | None] = {"bf16": None, "8-bit": 8, "4-bit": 4}


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "inspect",
        help="show a model's architecture and memory",
        description="Show a model's architecture, its parameters by part, and the memory that weights "
        "and caches take at 4k, 16k and 64k tokens. Only the config is read, no weights.",
    )
    add_model(parser, more=", or 7b or 32b for the published sizes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the config says; returns the exit code."""
    config = _config(args.model, args.revision)
    if args.json:
        print(json.dumps(_facts(args.model, config), ensure_ascii=False))
    else:
        print("\n\n".join((_title(args.model, config), _drawing(config), _table(config))))
    return 0


def _config(name: str, revision: str | None) -> Olmo3Config:
    if name.lower() in SIZES and not Path(name).exists():
        if revision:
            raise OptionError(f"--revision {revision} is for hub ids, not for {name}")
        return Olmo3Config.from_dict(SIZES[name.lower()], where=name)
    return load_config(resolve(name, revision, weights=False))[0]


def _facts(name: str, config: Olmo3Config) -> dict[str, Any]:
    """All that the drawing shows, for programs; memory in bytes."""
    return {
        "model": name,
        **asdict(config),
        "parameters": parameters_by_part(config),
        "weight_bytes": {label: weight_bytes(config, bits) for label, bits in _PRECISIONS.items()},
        "cache_bytes": {str(n): cache_bytes(config, n) for n in _contexts(config)},
        "machine_bytes": machine_bytes(),
    }


def _title(name: str, config: Olmo3Config) -> str:
    total = sum(parameters_by_part(config).values())
    lines = [f"{name}: Olmo 3, {_count(total)} parameters, context {config.max_position_embeddings:,} tokens"]
    if config.quantization is not None:
        how = config.quantization.default
        lines.append(f"weights as they are: {how.bits}-bit {how.mode}, group size {how.group_size}")
    return "\n".join(lines)


def _drawing(config: Olmo3Config) -> str:
    c = config
    parts = parameters_by_part(c)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    kind = "multi-head" if c.num_key_value_heads == c.num_attention_heads else "grouped-query"
    head = "embed_tokens again (tied)" if c.tie_word_embeddings else f"{c.hidden_size:,} → {c.vocab_size:,}"
    rows: list[tuple[str, str | None]] = [
        ("   tokens", None),
        ("     │", None),
        (f"   embed_tokens   {c.vocab_size:,} × {c.hidden_size:,}", "embedding"),
        ("     │", None),
        (f" ╭─ {c.num_hidden_layers} blocks: {_pattern(c)}", None),
        (" │   ├─────────╮", None),
        (f" │   │     self_attn   {kind}: {c.num_attention_heads} query heads, "
         f"{c.num_key_value_heads} key-value heads of {c.head_dim}", "attention"),
        (f" │   │         │       q_norm, k_norm: RMSNorm over all {queries:,} and all {keys:,}, before "
         "the split into heads", None),
        *((f" │   │         │       {k}: sees {_sees(c, k)}, {_rope(c.rope[k])}", None)
          for k in (SLIDING, FULL) if k in c.layer_types),
        (" │   │     RMSNorm     post_attention_layernorm", None),
        (" │  (+)◀───────╯", None),
        (" │   ├─────────╮", None),
        (f" │   │        mlp      SwiGLU {c.hidden_size:,} → {c.intermediate_size:,} → {c.hidden_size:,}",
         "feed-forward"),
        (" │   │     RMSNorm     post_feedforward_layernorm", None),
        (" │  (+)◀───────╯", None),
        (" ╰─  │", None),
        (f"   norm           RMSNorm, eps {c.rms_norm_eps:g} (counted: all norms)", "norms"),
        ("     │", None),
        (f"   lm_head        {head}", "head"),
        ("     │", None),
        ("   logits", None),
    ]  # fmt: skip
    width = max(len(text) for text, part in rows if part) + 3
    total = sum(parts.values())
    return "\n".join(
        f"{text:<{width}}{_count(parts[part]):>9} {parts[part] / total:6.1%}" if part else text
        for text, part in rows
    )


def _table(config: Olmo3Config) -> str:
    """Weights by precision, alone and with caches; a star marks what this machine cannot hold."""
    weights = {label: weight_bytes(config, bits) for label, bits in _PRECISIONS.items()}
    machine = machine_bytes()
    contexts = _contexts(config)
    largest = max(weights.values()) + cache_bytes(config, contexts[-1])
    size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")

    def row(label: str, caches: int) -> str:
        cells = (
            f"{(w + caches) / size:.2f}" + ("*" if w + caches > machine else " ") for w in weights.values()
        )
        shown = f"{caches / size:.2f}" if caches else ""
        return f"{label:<22}{shown:>10}" + "".join(f"{cell:>15}" for cell in cells)

    return "\n".join(
        (
            f"{f'memory in {unit}':<22}{'caches':>10}" + "".join(f"{f'{p} weights':>14} " for p in weights),
            row("weights alone", 0),
            *(row(f"with {n:,} tokens", cache_bytes(config, n)) for n in contexts),
            "",
            _verdict(config, weights, machine),
        )
    )


def _contexts(config: Olmo3Config) -> list[int]:
    """The contexts to show: those that the model has."""
    within = [n for n in _CONTEXTS if n <= config.max_position_embeddings]
    return within or [config.max_position_embeddings]


def _verdict(config: Olmo3Config, weights: dict[str, int], machine: int) -> str:
    fits = []
    for label, size in weights.items():
        longest = max((n for n in _contexts(config) if size + cache_bytes(config, n) <= machine), default=0)
        fits.append(f"{label} up to {longest:,} tokens" if longest else f"{label} does not fit (*)")
    return (
        f"This machine has {machine / 2**30:.1f} GiB for it: {'; '.join(fits)}.\n"
        f"Caches are counted in bfloat16; the working space of a pass comes on top."
    )


def _pattern(config: Olmo3Config) -> str:
    sliding, full = layer_counts(config)
    runs = [len(list(run)) for kind, run in groupby(config.layer_types)]
    if sliding and full and runs == [runs[0], 1] * full and config.layer_types[0] == SLIDING:
        return f"({runs[0]} sliding + 1 full) × {full}"
    return f"{sliding} sliding, {full} full"


def _sees(config: Olmo3Config, kind: str) -> str:
    return f"{config.sliding_window:,} tokens" if kind == SLIDING else "all tokens"


def _rope(rope: RopeConfig) -> str:
    if rope.rope_type == "default":
        return f"plain RoPE θ {rope.theta:,.0f}"
    return (
        f"YaRN × {rope.factor:g} from {rope.original_max_position_embeddings:,} θ {rope.theta:,.0f}, "
        f"attention factor {rope.attention_factor:.4f}"
    )


def _count(parameters: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)

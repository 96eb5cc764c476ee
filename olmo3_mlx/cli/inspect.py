"""olmo3 inspect: the architecture at a glance, and the memory it takes."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx

from olmo3_mlx.checkpoints.checkpoint import load_config, read_weights
from olmo3_mlx.checkpoints.hub import INDEX, has_weights, resolve
from olmo3_mlx.cli.options import add_memory, add_model
from olmo3_mlx.cli.wording import worded
from olmo3_mlx.config import FULL, SLIDING, Olmo3Config, RopeConfig
from olmo3_mlx.errors import MemoryFitError, OptionError
from olmo3_mlx.fields import read_json
from olmo3_mlx.memory.plan import MemoryFit, MemoryPlan, check_context, in_gib, plan
from olmo3_mlx.memory.sizes import layer_counts, parameters_by_part, weight_bytes
from olmo3_mlx.published import SIZES
from olmo3_mlx.quantization import in_words

_CONTEXTS = (4096, 16384, 65536)
_PRECISIONS: dict[str, int | None] = {"bf16": None, "8-bit": 8, "4-bit": 4}


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "inspect",
        help="show a model's architecture and memory",
        description="Show a model's architecture, its parameters by part, and the memory that weights, "
        "caches and working space take at 4k, 16k and 64k tokens, and what fits this machine. With "
        "--context or --kv-bits also whether just that fits. Weights are not read, only how many bytes they "
        "have.",
    )
    add_model(parser, more=", or 7b or 32b for the published sizes")
    add_memory(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the config says; returns the exit code."""
    config, stored = _config(args.model, args.revision)
    fit, weights = MemoryFit(config, args.kv_group_size, args.kv_start), _weights(config, stored)
    asked = _asked(fit, weights, args.context, args.kv_bits)
    if args.json:
        print(json.dumps({**_facts(args.model, fit, weights), **asked}, ensure_ascii=False))
    else:
        shown = [_title(args.model, config, stored), _drawing(config)]
        shown += [_table(fit, weights), _verdict(fit, weights)]
        if asked:
            shown.append("\n".join(_answers(fit, weights, args.context, args.kv_bits)))
        print("\n\n".join(shown))
    return 0


def _config(name: str, revision: str | None) -> tuple[Olmo3Config, int | None]:
    """The config, and the bytes of quantized weights, if they are known."""
    if name.lower() in SIZES and not Path(name).exists():
        if revision:
            raise OptionError(f"--revision {revision} is for hub ids, not for {name}")
        return Olmo3Config.from_dict(SIZES[name.lower()], where=name), None
    folder = resolve(name, revision, weights=False)
    config = load_config(folder)[0]
    return config, None if config.quantization is None else _stored(folder)


def _stored(folder: Path) -> int | None:
    """Bytes of the weights as they lie in the files, or as the index of files not fetched says."""
    if has_weights(folder):
        return sum(weight.nbytes for weight in read_weights(folder).values())
    index = folder / INDEX
    said = read_json(index).get("metadata") if index.is_file() else None
    size = said.get("total_size") if isinstance(said, dict) else None
    return size if isinstance(size, int) else None


def _facts(name: str, fit: MemoryFit, weights: dict[str, int]) -> dict[str, Any]:
    """All that the drawing shows, for programs; memory in bytes."""
    config, caches = fit.config, _caches(fit)
    plans = {c: {str(n): fit.at(0, n, bits) for n in _contexts(config)} for c, bits in caches.items()}
    return {
        "model": name,
        **asdict(config),
        "parameters": parameters_by_part(config),
        "weight_bytes": weights,
        "cache_bytes": {c: {n: made.caches for n, made in row.items()} for c, row in plans.items()},
        "working_bytes": {c: {n: made.working for n, made in row.items()} for c, row in plans.items()},
        "machine_bytes": fit.machine,
        "largest_context": {
            w: {c: fit.largest(size, bits) for c, bits in caches.items()} for w, size in weights.items()
        },
    }


def _asked(
    fit: MemoryFit, weights: dict[str, int], context: int | None, kv_bits: int | None
) -> dict[str, Any]:
    """The plans for the context and kv_bits of the command line, by precision of the weights."""
    if context is None and kv_bits is None:
        return {}
    check_context(fit.config, context)

    def facts(made: MemoryPlan) -> dict[str, Any]:
        return {**asdict(made), "total": made.total, "fits": made.fits}

    return {
        "plans": {
            label: facts(fit.at(size, context or max(1, fit.largest(size, kv_bits)), kv_bits))
            for label, size in weights.items()
        }
    }


def _answers(
    fit: MemoryFit, weights: dict[str, int], context: int | None, kv_bits: int | None
) -> Iterator[str]:
    """A line for each precision of the weights: the plan for this context and kv_bits, or why not."""
    for label, size in weights.items():
        try:
            made = plan(
                fit.config, size, context=context, kv_bits=kv_bits, kv_group_size=fit.kv_group_size,
                kv_start=fit.kv_start, machine=fit.machine,
            )  # fmt: skip
        except MemoryFitError as error:
            yield f"{label} weights do not fit: {worded(error)}"
            continue
        yield (
            f"{label} weights: {made.context:,} tokens fit in {in_gib(made.total)}, caches "
            f"{in_gib(made.caches)} and working space {in_gib(made.working)} included"
        )


def _weights(config: Olmo3Config, stored: int | None) -> dict[str, int]:
    """Bytes by precision; `stored` are those of the checkpoint itself."""
    usual = {label: weight_bytes(config, bits) for label, bits in _PRECISIONS.items()}
    return usual if stored is None or stored in usual.values() else {"stored": stored, **usual}


def _caches(fit: MemoryFit) -> dict[str, int | None]:
    """The precisions that this model's caches can have."""
    return {label: bits for label, bits in _PRECISIONS.items() if bits is None or fit.quantizes}


def _title(name: str, config: Olmo3Config, stored: int | None) -> str:
    total = sum(parameters_by_part(config).values())
    lines = [f"{name}: Olmo 3, {_count(total)} parameters, context {config.max_position_embeddings:,} tokens"]
    if config.quantization is not None:
        kinds = [how for how in config.quantization.overrides.values() if how is not None]
        size = "" if stored is None else f": {8 * stored / total:.2f} bits per weight"
        lines.append(f"weights as they are: {in_words([config.quantization.default, *kinds])}{size}")
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


def _table(fit: MemoryFit, weights: dict[str, int]) -> str:
    """What each precision of weights takes with each of caches; a star marks what does not fit."""
    contexts = _contexts(fit.config)
    largest = fit.at(max(weights.values()), contexts[-1]).total
    size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")

    def cell(total: int) -> str:
        return f"{total / size:.2f}" + (" " if total <= fit.machine else "*")

    def row(context: int, caches: str, bits: int | None) -> str:
        made = fit.at(0, context, bits)
        parts = [f"{part / size:.2f}" for part in (made.caches, made.working)]
        totals = [cell(made.total + w) for w in weights.values()]
        return _row(f"{context:,} tokens, {caches} caches", parts, totals)

    return "\n".join(
        (
            _row(f"memory in {unit}", ["caches", "working"], [f"{w} weights " for w in weights]),
            _row("weights alone", ["", ""], [cell(w) for w in weights.values()]),
            *(row(n, caches, bits) for n in contexts for caches, bits in _caches(fit).items()),
        )
    )


def _verdict(fit: MemoryFit, weights: dict[str, int]) -> str:
    """The largest contexts that fit."""

    def row(caches: str, bits: int | None) -> str:
        largest = (fit.largest(size, bits) for size in weights.values())
        return _row(f"with {caches} caches", ["", ""], [f"{n:,} " if n else "none*" for n in largest])

    lines = [
        f"This machine has {in_gib(fit.machine)} for it. The largest contexts that fit, in tokens:",
        *(row(caches, bits) for caches, bits in _caches(fit).items()),
    ]
    if mx.default_device().type == mx.DeviceType.cpu:
        lines.append(
            "On MLX's CPU backend quantized weights compute in float32: caches and working space take "
            "twice that."
        )
    return "\n".join(lines)


def _row(label: str, parts: list[str], totals: list[str]) -> str:
    return (f"{label:<28}" + "".join(f"{p:>9}" for p in parts) + "".join(f"{t:>17}" for t in totals)).rstrip()


def _contexts(config: Olmo3Config) -> list[int]:
    """The contexts to show: those that the model has."""
    within = [n for n in _CONTEXTS if n <= config.max_position_embeddings]
    return within or [config.max_position_embeddings]


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

"""olmo3 inspect: the architecture at a glance, and the memory it takes."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.files import INDEX, has_weights
from olmo3_mlx.cli.drawing import count, drawing
from olmo3_mlx.cli.memory_table import MemoryTable
from olmo3_mlx.cli.options import add_memory, add_model, cache_options
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import OptionError
from olmo3_mlx.fields import read_json
from olmo3_mlx.memory.plan import MemoryFit
from olmo3_mlx.memory.sizes import parameters_by_part
from olmo3_mlx.published import SIZES
from olmo3_mlx.quantization import in_words


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
    add_model(parser, more=", or 7b or 32b for the published sizes", positional=True)
    add_memory(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the config says; returns the exit code."""
    config, stored = _config(args.model, args.revision)
    table = MemoryTable.of(MemoryFit(config), stored, args.kv_group_size, args.kv_start)
    quantized = args.kv_bits is not None  # without it the table alone shows what --kv-group-size does
    options = cache_options(args) if quantized else CacheOptions()
    asked = args.context is not None or args.kv_bits is not None
    if args.json:
        plans = {"plans": table.asked(args.context, options)} if asked else {}
        facts = {"model": args.model, **asdict(config), "parameters": parameters_by_part(config)}
        print(json.dumps({**facts, **table.facts(), **plans}, ensure_ascii=False))
        return 0
    shown = [_title(args.model, config, stored), drawing(config), table.text(), table.verdict()]
    if asked:
        shown.append("\n".join(table.answers(args.context, options)))
    print("\n\n".join(shown))
    return 0


def _config(name: str, revision: str | None) -> tuple[Olmo3Config, int | None]:
    """The config, and the bytes of quantized weights, if they are known."""
    if name.lower() in SIZES and not Path(name).exists():
        if revision:
            raise OptionError(f"--revision {revision} is for hub ids, not for {name}")
        return Olmo3Config.from_dict(SIZES[name.lower()], where=name), None
    checkpoint = Checkpoint.open(name, revision, weights=False)
    return checkpoint.config, None if checkpoint.config.quantization is None else _stored(checkpoint)


def _stored(checkpoint: Checkpoint) -> int | None:
    """Bytes of the weights as they lie in the files, or as the index of files not fetched says."""
    if has_weights(checkpoint.folder):
        return sum(header.nbytes for header in checkpoint.headers.values())
    index = checkpoint.folder / INDEX
    metadata = read_json(index).get("metadata") if index.is_file() else None
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if isinstance(size, int) else None


def _title(name: str, config: Olmo3Config, stored: int | None) -> str:
    total = sum(parameters_by_part(config).values())
    lines = [f"{name}: Olmo 3, {count(total)} parameters, context {config.max_position_embeddings:,} tokens"]
    if config.quantization is not None:
        kinds = [layer for layer in config.quantization.overrides.values() if layer is not None]
        size = "" if stored is None else f": {8 * stored / total:.2f} bits per weight"
        lines.append(f"weights as they are: {in_words([config.quantization.default, *kinds])}{size}")
    return "\n".join(lines)

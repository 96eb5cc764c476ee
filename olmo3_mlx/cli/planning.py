"""What a command line says about memory, made a plan before anything is loaded."""

import argparse
from pathlib import Path
from typing import Any

from olmo3_mlx.checkpoints.checkpoint import load_config
from olmo3_mlx.checkpoints.hub import resolve
from olmo3_mlx.memory.plan import MemoryPlan, plan
from olmo3_mlx.memory.sizes import stored_itemsize, stored_weight_bytes
from olmo3_mlx.sessions.session import CHECKPOINT_BYTES


def planned(args: argparse.Namespace) -> tuple[Path, MemoryPlan]:
    """The checkpoint's folder, fetched if need be, and a plan that fits. Raises MemoryFitError, which
    says what would fit, or OptionError.
    """
    folder = resolve(args.model, args.revision)
    config = load_config(folder)[0]
    made = plan(
        config,
        stored_weight_bytes(folder),
        context=args.context,
        itemsize=stored_itemsize(folder),
        **_quantization(args),
    )
    return folder, made


def caches(args: argparse.Namespace, made: MemoryPlan) -> dict[str, Any]:
    """How a Session is to hold its caches: as planned, with checkpoints in what is left."""
    left = made.machine - made.total
    return {
        "context": made.context,
        "checkpoint_bytes": min(CHECKPOINT_BYTES, left // 2),
        **_quantization(args),
    }


def _quantization(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "kv_start": args.kv_start,
    }

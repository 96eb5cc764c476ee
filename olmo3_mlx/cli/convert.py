"""olmo3 convert: a checkpoint to MLX form, quantized."""

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "convert",
        help="quantize a checkpoint",
        description="Quantize a checkpoint's linear layers, embedding and head to 4 or 8 bits, for "
        "this program and mlx-lm. Norms stay as they are. With --dtype and without --bits, only cast.",
        epilog="DEST appears when it is complete. A run that was killed leaves a hidden folder "
        ".DEST.unfinished-* beside it, which can be removed.",
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE, DEST and the options, as `python -m convert` takes them too."""
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint's folder, or a hub id")
    parser.add_argument("dest", metavar="DEST", help="the folder to write, which must not exist yet")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), help="bits per weight (default: 4, unless --dtype is given)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        choices=(32, 64, 128),
        help="weights that share a scale (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="cast what is not quantized, and the scales (default: as in SOURCE)",
    )
    parser.add_argument("--revision", metavar="R", help="a hub id's branch, tag or commit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and print what came out; returns the exit code."""
    from tqdm import tqdm  # noqa: PLC0415

    from convert import convert  # noqa: PLC0415  (the library never needs it)

    bar: tqdm[NoReturn]
    with tqdm(
        total=0, unit="B", unit_scale=True, desc="converting", file=sys.stderr, leave=False, disable=None
    ) as bar:
        report = convert(
            args.source,
            args.dest,
            bits=args.bits or (None if args.dtype else 4),
            group_size=args.group_size,
            dtype=args.dtype,
            revision=args.revision,
            progress=lambda done, total: _show(bar, done, total),
        )
    if report.left_out:
        print(
            f"not quantized, as {args.group_size} does not divide their inputs: {', '.join(report.left_out)}",
            file=sys.stderr,
        )
    print(
        f"{args.dest}: {report.bits_per_weight:.3f} bits per weight, {report.bytes / 1e9:.3f} GB "
        f"(was {report.source_bytes / 1e9:.3f} GB), {report.seconds:.1f} s"
    )
    return 0


def _show(bar: "tqdm[NoReturn]", done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)

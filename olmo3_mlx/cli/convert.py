"""olmo3 convert: a checkpoint to MLX form, quantized."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from olmo3_mlx.cli.bar import progress_bar
from olmo3_mlx.cli.columns import in_columns
from olmo3_mlx.cli.interrupt import Terminated, ending_in_order
from olmo3_mlx.cli.wording import worded

if TYPE_CHECKING:
    from convert import ConvertOptions, Report
    from convert.card.quality import Figures

DESCRIPTION = """\
Quantize a checkpoint's linear layers, embedding and head, for this program and mlx-lm. Norms stay as they
are. With --dtype alone, only cast, or dequantize. Memory stays at some rows of a tensor, whatever the
model's size; calibrating (--calibrate, --target-bpw, --target-gb) runs the model block by block several
times, which takes minutes to hours instead of seconds, and memory for some blocks in float32.
"""
EPILOG = """\
A recipe is a file like this one; the last pattern that matches a layer counts:
  bits = 4
  group_size = 64
  [layers]
  "*.down_proj" = 6
  "lm_head" = "none"

A quantized checkpoint's folder is a recipe too. Stages of one model share which layers need bits:
  A B --target-gb 4 --save-recipe olmo3-4gb.toml, then C D --recipe olmo3-4gb.toml --calibrate

Those who know mlx_lm.convert: `--hf-path A --mlx-path B -q --q-bits 4 --q-group-size 64` is
`A B --bits 4 --group-size 64` here, `--dequantize` is --dtype bfloat16, `--upload-repo` is --upload.

DEST appears when it is complete and was read back. A run that was stopped leaves a hidden folder
.DEST.unfinished beside it: go on with --resume, or remove it. Stopped before it wrote anything
down it leaves none, and --resume begins anew.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "convert",
        help="quantize a checkpoint",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE, DEST and the options, as `python -m convert` takes them too."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder of Hugging Face, MLX or OLMo-core, or a hub id"
    )
    parser.add_argument("dest", metavar="DEST", help="the folder to write, which must not exist yet")
    parser.add_argument("--revision", metavar="R", help="a hub id's branch, tag or commit")
    parser.add_argument(
        "--no-keep",
        action="store_true",
        help="remove each file of a hub id when it was converted, instead of keeping it in the cache",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a conversion that was stopped")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="a folder or hub id whose tokenizer and template are taken"
    )
    parser.add_argument("--upload", metavar="REPO", help="put the result on the hub, as you/olmo3-7b-4bit")
    parser.add_argument(
        "--card",
        action=argparse.BooleanOptionalAction,
        help="measure the result against SOURCE and write QUALITY.md (default: if it is quantized)",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="measure on these texts, each apart (default: some of several kinds that come along)",
    )
    _add_quantizing(parser)
    parser.set_defaults(run=run)


def _add_quantizing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to quantize")
    group.add_argument(
        "--bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8),
        help="bits per weight (default: 4, in mode mxfp8 8, unless --dtype alone is given)",
    )
    group.add_argument(
        "--group-size",
        type=int,
        choices=(16, 32, 64, 128),
        help="weights that share a scale (default: 64, in modes mxfp4 and mxfp8 32, in nvfp4 16)",
    )
    group.add_argument(
        "--mode", choices=("affine", "mxfp4", "nvfp4", "mxfp8"), help="MLX's quantization (default: affine)"
    )
    group.add_argument(
        "--recipe",
        metavar="NAME|FILE|FOLDER",
        help="which layers get how many bits: mixed_4_5 (4, but 5 for values, outputs, gate and down), "
        "mixed_4_6 (4, but 6 for values and outputs), mixed_3_5 (3, but 5 for values, outputs and down), "
        "a TOML file, or a quantized checkpoint's folder; they are not mlx-lm's recipes of those names",
    )
    group.add_argument(
        "--save-recipe",
        metavar="FILE",
        help="write which layers got how many bits to a new file, for --recipe",
    )
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="cast what is not quantized, and the scales (default: as in SOURCE)",
    )
    _add_calibrating(group)


def _add_calibrating(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--calibrate",
        nargs="*",
        metavar="FILE",
        help="quantize so that texts are read as the original reads them (default: some of several kinds "
        "that come along, and what a chat model itself writes; a .jsonl file holds conversations, one a "
        "line; self is what the model writes, chats what is saved of yours on this machine, as olmo3 "
        "sessions lists it; ./self and ./chats are files): slower and closer; unless a "
        "recipe is given, layers that matter more get more bits at the same size. Write it after DEST",
    )
    group.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help="calibrate to X bits per weight in all, instead of --bits",
    )
    group.add_argument(
        "--target-gb",
        type=float,
        metavar="X",
        help="calibrate to at most X GB (10^9 bytes) in all, instead of --bits",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and print what came out; returns the exit code."""
    from convert import convert  # noqa: PLC0415  (the library never needs it)

    options = _options(args)
    with ending_in_order(), _resumable(args), progress_bar("beginning") as bar:
        report = convert(
            args.source,
            args.dest,
            options,
            progress=bar.progress,
            stage=bar.stage,
            notice=lambda error: bar.say(worded(error)),
        )
    _tell_outcome(args, report)
    _tell_quality(args, report)
    return 0


def _options(args: argparse.Namespace) -> "ConvertOptions":
    """The options of a command line: --dtype alone only casts. Raises OptionError."""
    from convert.options import ConvertOptions  # noqa: PLC0415  (the library never needs it)
    from convert.recipe import recipe_conflict  # noqa: PLC0415

    if args.recipe and args.mode:  # affine is as good as none to ConvertOptions
        raise recipe_conflict()
    calibrates = any(x is not None for x in (args.calibrate, args.target_bpw, args.target_gb))
    quantizes = args.bits or args.mode or args.recipe or calibrates
    return ConvertOptions(
        bits=args.bits or (None if args.dtype and not quantizes else ...),
        group_size=args.group_size,
        mode=args.mode or "affine",
        recipe=args.recipe,
        dtype=args.dtype,
        calibrate=False if args.calibrate is None else args.calibrate or True,
        target_bpw=args.target_bpw,
        target_gb=args.target_gb,
        save_recipe=args.save_recipe,
        revision=args.revision,
        tokenizer=args.tokenizer,
        resume=args.resume,
        keep=not args.no_keep,
        card=args.card,
        text=args.text,
        upload_to=args.upload,
    )


@contextmanager
def _resumable(args: argparse.Namespace) -> Iterator[None]:
    """Say if there is nothing to go on with, and after an interrupt if there is."""
    from convert.writer.folder import destination, resumable  # noqa: PLC0415  (the library never needs it)

    if args.resume and not resumable(args.dest) and not destination(args.dest).exists():
        print(
            f"no conversion to {args.dest} was begun: there is nothing to resume, this begins one",
            file=sys.stderr,
        )
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        if resumable(args.dest):
            stop.args += ("what was done is kept, go on with --resume",)
        raise


def _tell_outcome(args: argparse.Namespace, report: "Report") -> None:
    """Print what came out."""
    from convert.size import in_words  # noqa: PLC0415

    if report.left_out:
        print(
            f"not quantized, as the group size does not divide their inputs: {', '.join(report.left_out)}",
            file=sys.stderr,
        )
    print(
        f"{args.dest}: {report.bits_per_weight:.3f} bits per weight, {in_words(report.bytes)} "
        f"(was {in_words(report.source_bytes)}), {report.seconds:.1f} s"
    )


def _tell_quality(args: argparse.Namespace, report: "Report") -> None:
    """Print how good the result is, if that was measured; a poor one gets advice."""
    from convert.card.command import CompareCommand  # noqa: PLC0415
    from convert.card.comparison import FLATTERED  # noqa: PLC0415

    reason = None if report.no_card is None else worded(report.no_card)
    if report.comparison is None:
        if reason is not None:
            print(f"not measured: {reason}", file=sys.stderr)
        return
    comparison = report.comparison
    if reason is not None:
        command = CompareCommand(
            args.source,
            args.dest,
            text=args.text,
            tokenizer=args.dest if args.tokenizer else None,
            revision_a=args.revision,
            card=args.dest,
        )
        print(f"no quality card: {reason} (`{command}` makes one)", file=sys.stderr)
    print(
        f"quality: {comparison.verdict} ({comparison.meaning})"
        f"{f', said of {comparison.said_of}' if comparison.said_of else ''}"
        f"{'; see QUALITY.md' if reason is None else ''}"
    )
    rows = [_cells(kind, figures) for kind, figures in comparison.quality.kinds.items()]
    print(*(f"  {line}" for line in in_columns(rows, left=(0, 1, 2, 3))), sep="\n")
    if report.flattered:
        print(f"{FLATTERED}: measure on others (--text FILE ...)", file=sys.stderr)
    if comparison.verdict == "poor":
        end = "; try" if report.advice else ", at the most bits and smallest groups that there are"
        print(f"the result is poor{end}", *report.advice, sep="\n  - ", file=sys.stderr)


def _cells(kind: str, figures: "Figures") -> tuple[str, ...]:
    """What is printed of a kind of text."""
    before, after = figures.perplexity
    return (
        kind,
        f"KL {figures.kl_mean:.5f} ± {figures.kl_error:.5f}",
        f"same top token {figures.agreement:.1%}",
        f"perplexity {before:.3f} -> {after:.3f}",
    )

"""olmo3 compare: how far one checkpoint is from another."""

import argparse
import json
from typing import TYPE_CHECKING

from olmo3_mlx.cli.bar import progress_bar
from olmo3_mlx.cli.columns import in_columns

if TYPE_CHECKING:
    from convert import Comparison
    from convert.card.quality import Figures, Quality


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "compare",
        help="measure how far a checkpoint is from its original",
        description="Measure how far checkpoint B is from checkpoint A, by kind of text: KL divergence "
        "of next-token distributions, perplexities, layer by layer errors. Works for any two of one "
        "architecture and vocabulary: a quantized one and its original, or two stages of training. "
        "Both are read block by block, so that neither needs to fit into memory.",
        epilog="The report says good, fair or poor; QUALITY.md, which --card writes, says what that means.",
    )
    parser.add_argument("a", metavar="A", help="the original: a checkpoint's folder, or a hub id")
    parser.add_argument("b", metavar="B", help="what became of it: the same")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="one text in UTF-8 or more, each measured apart; a .jsonl file holds conversations, one a line "
        "(default: prose, documents, code and conversations that come with this)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=2048,
        metavar="N",
        help="tokens to read of each text, spread over it (default: %(default)s)",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of one sequence: each starts without context (default: 512, or as many as both take)",
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="a folder or hub id whose tokenizer and template are taken"
    )
    parser.add_argument("--revision-a", metavar="R", help="branch, tag or commit of A, if that is a hub id")
    parser.add_argument("--revision-b", metavar="R", help="the same of B")
    parser.add_argument(
        "--card", metavar="DIR", help="write QUALITY.md, quality.json and pictures to DIR, made if need be"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    from convert import compare  # noqa: PLC0415  (the library never needs it)

    with progress_bar("comparing") as bar:
        comparison = compare(
            args.a,
            args.b,
            text=args.text,
            tokens=args.tokens,
            length=args.length,
            tokenizer=args.tokenizer,
            revision_a=args.revision_a,
            revision_b=args.revision_b,
            card=args.card,
            progress=bar.progress,
        )
    print(json.dumps(comparison.figures(), ensure_ascii=False) if args.json else _report(comparison))
    return 0


def _report(comparison: "Comparison") -> str:
    from convert.card.comparison import FLATTERED  # noqa: PLC0415
    from convert.card.verdict import place  # noqa: PLC0415

    q = comparison.quality
    decided_by = comparison.decided_by
    count, length = comparison.texts.tokens.shape
    most = max(q.layers, key=lambda e: e.added)
    a, b = q.sizes
    rows = [
        ("size", f"{a.in_words} → {b.in_words}"),
        ("bits per weight", f"{a.bits_per_weight:.2f} → {b.bits_per_weight:.2f}"),
        ("worst text", f"{decided_by}, {place(q.kinds[decided_by].kl_mean)}"),
        ("largest KL", f"{q.kl_max:.3f} nats at one of {q.tokens:,} positions"),
        ("hidden states", f"{q.layers[-1].accumulated:.2%} off after the last layer"),
        ("", f"{most.name} adds the most, {most.added:.2%}"),
    ]  # fmt: skip
    quantized = comparison.original_quantization
    of = f" on {comparison.said_of}" if comparison.said_of else ""
    lines = [
        f"{comparison.original} → {comparison.result}",
        *([f"the first is quantized itself ({quantized})"] if quantized else []),
        f"on {count} × {length:,} tokens of {comparison.texts.described}",
        "",
        *_table(q),
        "",
        *(f"  {label:<16}{text}" for label, text in rows),
        "",
        f"{comparison.verdict}{of}: {comparison.meaning}",
        *([FLATTERED] if comparison.flattered else []),
    ]
    if comparison.advice:
        lines += ["to come closer, try", *(f"  - {line.replace('`', '')}" for line in comparison.advice)]
    return "\n".join(lines)


def _table(quality: "Quality") -> list[str]:
    """A line for each kind of text, and one for all if there are several."""
    kinds: dict[str, Figures] = dict(quality.kinds)
    if len(kinds) > 1:
        kinds["all"] = quality
    titles = ("", "KL in nats", "median", "99 %", "99.9 %", "same top token", "perplexity", "ratio")
    rows = [titles, *((kind, *_cells(figures)) for kind, figures in kinds.items())]
    return [f"  {line}" for line in in_columns(rows, left=(0,))]


def _cells(figures: "Figures") -> tuple[str, ...]:
    before, after = figures.perplexity
    return (
        f"{figures.kl_mean:.5f} ± {figures.kl_error:.5f}",
        f"{figures.kl_median:.5f}",
        f"{figures.kl_99:.4f}",
        f"{figures.kl_999:.3f}",
        f"{figures.agreement:.2%} ± {figures.agreement_error:.2%}",
        f"{before:.3f} → {after:.3f}",
        f"{figures.perplexity_ratio:.4f} ± {figures.perplexity_ratio_error:.4f}",
    )

"""olmo3 compare: how far one checkpoint is from another."""

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from olmo3_mlx.cli.bar import progress_bar, show
from olmo3_mlx.errors import OptionError, TokenizerError
from olmo3_mlx.quantization import in_words

if TYPE_CHECKING:
    from convert.card.page import Measured
    from convert.card.quality import Quality
    from convert.reading.source import Source
    from olmo3_mlx.text.tokenizer import Tokenizer


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "compare",
        help="measure how far a checkpoint is from its original",
        description="Measure how far checkpoint B is from checkpoint A on a text: KL divergence of "
        "next-token distributions, perplexities, layer by layer errors. Works for any two of one "
        "architecture and vocabulary: a quantized one and its original, or two stages of training. "
        "Both are read block by block, so that neither needs to fit into memory.",
        epilog="The report says good, fair or poor; QUALITY.md, which --card writes, says what that means.",
    )
    parser.add_argument("a", metavar="A", help="the original: a checkpoint's folder, or a hub id")
    parser.add_argument("b", metavar="B", help="what became of it: the same")
    parser.add_argument(
        "--text", metavar="FILE", help="a text in UTF-8 (default: old English prose that comes with this)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens to read, spread over the text (default: %(default)s)",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=512,
        metavar="N",
        help="tokens of one sequence: each starts without context (default: %(default)s)",
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
    from convert.card.measure import check_comparable, measure  # noqa: PLC0415
    from convert.card.page import called, figures, write_card  # noqa: PLC0415  (the library never needs it)
    from convert.reading.source import Source  # noqa: PLC0415

    if args.card is not None:
        _check_card(Path(args.card))
    original, result = Source.open(args.a, args.revision_a), Source.open(args.b, args.revision_b)
    check_comparable(original, result)
    measured = _measured(args, original, result)
    if args.card is not None:
        _make(Path(args.card))
    with progress_bar("comparing") as bar:
        quality = measure(original, result, measured.tokens, lambda done, total: show(bar, done, total))
    if args.card is not None:
        a, b, command = called(args.a), called(args.b), _command(args, called)
        write_card(Path(args.card), quality, replace(measured, original=a, result=b, command=command))
    print(
        json.dumps(figures(quality, measured), ensure_ascii=False)
        if args.json
        else _report(quality, measured)
    )
    return 0


def _check_card(folder: Path) -> None:
    """Raise OptionError for what is no folder, or holds a card, which may be of other checkpoints."""
    from convert.card.page import CARD, FIGURES  # noqa: PLC0415

    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--card {folder}: expected a folder")
    there = [name for name in (CARD, FIGURES) if (folder / name).exists()]
    if there:
        raise OptionError(
            f"--card {folder}: holds a card already ({', '.join(there)}): name another folder, or remove it"
        )


def _make(folder: Path) -> None:
    """The folder of a card, before the long work. Raises OptionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--card {folder}: the folder cannot be made ({error.strerror})") from None


def _measured(args: argparse.Namespace, original: "Source", result: "Source") -> "Measured":
    """The text as tokens, and the rest of what a card says about how it was measured."""
    from convert.calibration.text import CalibratedOn  # noqa: PLC0415
    from convert.card.evaluation import Evaluation  # noqa: PLC0415
    from convert.card.page import FIGURES  # noqa: PLC0415
    from convert.card.verdict import Quantized  # noqa: PLC0415
    from convert.reading.texts import read_text  # noqa: PLC0415
    from olmo3_mlx.checkpoints.hub import resolve  # noqa: PLC0415
    from olmo3_mlx.model import Olmo3  # noqa: PLC0415
    from olmo3_mlx.text.tokenizer import Tokenizer  # noqa: PLC0415

    if args.tokens < 2:
        raise OptionError(f"--tokens must be at least 2, not {args.tokens}")
    file = None if args.text is None else Path(args.text)
    folder = original.folder if args.tokenizer is None else resolve(args.tokenizer, weights=False)
    if args.tokenizer is None and not (folder / "tokenizer.json").is_file():
        raise TokenizerError(f"{folder}: has no tokenizer.json: say with --tokenizer MODEL whose to take")
    tokenizer = Tokenizer.from_folder(folder)
    _check_tokenizers(tokenizer, folder, result.folder, read_text(file))
    evaluation = Evaluation.make(file, tokenizer, args.tokens, args.length)
    inputs = {path: inputs for path, (_, inputs) in Olmo3(result.config).quantizable().items()}
    made = Quantized.found(result.quantized, inputs, CalibratedOn.told(result.folder / FIGURES))
    how = in_words(original.quantized.values())
    return evaluation.measured(args.a, args.b, _command(args), made, how)


def _check_tokenizers(tokenizer: "Tokenizer", folder: Path, other: Path, text: str) -> None:
    """Raise OptionError if B's tokenizer, where it has one, reads the text differently. Tags that stages of
    training name differently do no harm.
    """
    ours, theirs = folder / "tokenizer.json", other / "tokenizer.json"
    if not theirs.is_file() or theirs.read_bytes() == ours.read_bytes():
        return
    if type(tokenizer).from_folder(other).encode(text) != tokenizer.encode(text):
        raise OptionError(
            f"{other}: its tokenizer reads the text differently from that of {folder}: nothing to compare"
        )


def _command(args: argparse.Namespace, called: Callable[[str], str] = str) -> str:
    """What does it again; `called` says what folders and files are called in it."""
    words = ["olmo3", "compare", called(args.a), called(args.b)]
    words += ["--tokens", str(args.tokens), "--length", str(args.length)]
    for option in ("text", "tokenizer"):
        value = getattr(args, option)
        words += [f"--{option}", called(value)] if value is not None else []
    for option in ("revision_a", "revision_b"):
        value = getattr(args, option)
        words += [f"--{option.replace('_', '-')}", value] if value is not None else []
    return shlex.join(words)


def _report(quality: "Quality", measured: "Measured") -> str:
    from convert.card.page import FLATTERED  # noqa: PLC0415
    from convert.card.verdict import advice, meaning, verdict  # noqa: PLC0415

    q, word = quality, verdict(quality)
    count, length = measured.tokens.shape
    most = max(q.layers, key=lambda e: e.added)
    (a, b), (before, after) = q.sizes, q.perplexity
    rows = [
        ("size", f"{a.in_words} → {b.in_words}"),
        ("bits per weight", f"{a.bits_per_weight:.2f} → {b.bits_per_weight:.2f}"),
        ("perplexity", f"{before:.3f} → {after:.3f} ({after / before - 1:+.2%})"),
        ("KL divergence", f"{q.kl_mean:.5f} ± {q.kl_error:.5f} nats on average"),
        ("", f"{q.kl_median:.5f} median, {q.kl_99:.4f} 99th percentile, {q.kl_max:.3f} largest"),
        ("same top token", f"{q.agreement:.2%} of {q.tokens:,} positions"),
        ("hidden states", f"{q.layers[-1].accumulated:.2%} off after the last layer"),
        ("", f"{most.name} adds the most, {most.added:.2%}"),
    ]  # fmt: skip
    lines = [
        f"{measured.original} → {measured.result}",
        *([f"the first is quantized itself ({measured.quantized})"] if measured.quantized else []),
        f"on {count} × {length:,} tokens of {measured.text}",
        "",
        *(f"  {label:<16}{text}" for label, text in rows),
        "",
        f"{word}: {meaning(word)}",
        *([FLATTERED] if measured.flattered else []),
    ]
    tried = advice(quality, measured.made)
    if tried:
        lines += ["to come closer, try", *(f"  - {line.replace('`', '')}" for line in tried)]
    return "\n".join(lines)

"""Comparing two checkpoints: how far one is from the other on texts."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType

from convert.calibration.text import CalibratedOn
from convert.card.command import CompareCommand
from convert.card.comparison import Comparison
from convert.card.evaluation import EvaluationTexts, texts_to_measure_on
from convert.card.measure import check_comparable, context, measure
from convert.card.method import QuantizationMethod
from convert.card.page import CARD, FIGURES
from convert.card.quality_card import write_card
from convert.options import check_type
from convert.progress import Progress
from convert.reading.source import Source
from convert.texts.given import Files, files_of
from convert.texts.kinds import Text
from olmo3_mlx.checkpoints.names import is_hub_id, resolve
from olmo3_mlx.errors import CheckpointError, OptionError, Setting, TokenizerError
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import in_words
from olmo3_mlx.text.tokenizer import Tokenizer

_LENGTH = 512  # tokens of a sequence, where the models take so many

_EXPECTED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "a": ((str, Path), "a folder or a hub id"),
    "b": ((str, Path), "a folder or a hub id"),
    "text": ((str, Path, list, tuple, NoneType), "a text file, several or None"),
    "tokens": ((int,), "a whole number"),
    "length": ((int, NoneType), "a whole number or None"),
    "tokenizer": ((str, Path, NoneType), "a folder, a hub id or None"),
    "revision_a": ((str, NoneType), "a branch, tag or commit, or None"),
    "revision_b": ((str, NoneType), "a branch, tag or commit, or None"),
    "card": ((str, Path, NoneType), "a folder or None"),
    "progress": ((Callable, NoneType), "a function or None"),  # type: ignore[dict-item]
}


def compare(
    a: str | Path,
    b: str | Path,
    *,
    text: Files | None = None,
    tokens: int = 2048,
    length: int | None = None,
    tokenizer: str | Path | None = None,
    revision_a: str | None = None,
    revision_b: str | None = None,
    card: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure how far the checkpoint `b` is from the original `a` on texts.

    Each is a folder, or a hub id at its revision; they have one architecture and one vocabulary: a quantized
    checkpoint and its original, or two stages of training. Both are read block by block, so that neither
    needs to fit into memory.

    About `tokens` tokens of each text are read in sequences of `length` (512, or as many as both models
    take), each without context, spread over the text. `text` is a file in UTF-8 or several, each a kind of
    its own; a .jsonl file holds conversations, one a line, which go through the original's chat template.
    Left out it is those that come with this package: prose, documents, code, and conversations if there is
    a template. `tokenizer` is a checkpoint whose tokenizer and template read the texts instead of the
    original's. `card` is a folder, new or not, that QUALITY.md, quality.json and two pictures are written
    to. `progress(done, total)` counts the weights of both that have been read.

        from convert import compare
        comparison = compare("Olmo-3-7B", "olmo3-7b-4bit")
        print(comparison.verdict, comparison.decided_by, comparison.quality.kinds["code"].kl_mean)

    Raises OptionError for a text, a number of tokens or a card's folder that cannot be, and for tokenizers
    that read the texts differently; ConfigError, CheckpointError or HubError for a checkpoint that cannot be
    read or holds NaN; TokenizerError; PromptError for tokens outside the vocabulary; ConvertError for two
    checkpoints that cannot be compared, or a card that cannot be written.
    """
    _check_types(
        a=a, b=b, text=text, tokens=tokens, length=length, tokenizer=tokenizer,
        revision_a=revision_a, revision_b=revision_b, card=card, progress=progress,
    )  # fmt: skip
    folder = None if card is None else Path(card)
    if folder is not None:
        _check_card(folder)
    for name, option, revision in ((a, "revision_a", revision_a), (b, "revision_b", revision_b)):
        _check_revision(name, option, revision)
    original, result = Source.open(a, revision_a), Source.open(b, revision_b)
    check_comparable(original, result)
    length = min(_LENGTH, context(original, result)) if length is None else length
    reader, files = _tokenizer_folder(original, tokenizer), files_of("text", text)
    words = Tokenizer.from_folder(reader)
    texts = texts_to_measure_on(files, words)
    _check_reads_the_same(result, reader, words, texts)
    read = EvaluationTexts.cut(texts, words, tokens, length)
    if folder is not None:
        _make(folder)
    quality = measure(original, result, read.tokens, progress, kinds=read.kinds)
    command = CompareCommand(
        str(a),
        str(b),
        tokens=tokens,
        length=length,
        text=files,
        tokenizer=tokenizer,
        revision_a=revision_a,
        revision_b=revision_b,
    )
    comparison = Comparison(quality, read, command, _method(result), in_words(original.quantized.values()))
    if folder is not None:
        write_card(folder, comparison.without_paths())
    return comparison


def _check_types(**arguments: object) -> None:
    """Raise OptionError for an argument of `compare` of another type than it takes."""
    for name, value in arguments.items():
        check_type(name, value, *_EXPECTED[name])


def _check_revision(name: str | Path, option: str, revision: str | None) -> None:
    """Raise CheckpointError, which names the option, for the revision of what is no hub id."""
    if revision is not None and not is_hub_id(name):
        resolve(name)
        raise CheckpointError(f"{name} is a folder here: ", Setting(option, revision), " is for hub ids")


def _check_card(folder: Path) -> None:
    """Raise OptionError for what is no folder, or holds a card, which may be of other checkpoints."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(Setting("card", str(folder)), ": expected a folder")
    cards = [name for name in (CARD, FIGURES) if (folder / name).exists()]
    if cards:
        raise OptionError(
            Setting("card", str(folder)),
            f": holds a card already ({', '.join(cards)}): name another folder, or remove it",
        )


def _make(folder: Path) -> None:
    """Make the folder of a card, before the long work. Raises OptionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            Setting("card", str(folder)), f": the folder cannot be made ({error.strerror})"
        ) from None


def _tokenizer_folder(original: Source, name: str | Path | None) -> Path:
    """The checkpoint whose tokenizer reads the texts: the original, or another one."""
    folder = original.folder if name is None else resolve(name, weights=False)
    if name is None and not (folder / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{folder}: has no tokenizer.json: say with ", Setting("tokenizer", "MODEL"), " whose to take"
        )
    return folder


def _check_reads_the_same(result: Source, reader: Path, words: Tokenizer, texts: Sequence[Text]) -> None:
    """Raise OptionError if the result's tokenizer, where it has one, reads the texts differently from that of
    `reader`. Tags that stages of training name differently do no harm.
    """
    ours, theirs = reader / "tokenizer.json", result.folder / "tokenizer.json"
    if not theirs.is_file() or theirs.read_bytes() == ours.read_bytes():
        return
    other = Tokenizer.from_folder(result.folder)
    tags = [re.escape(token.content) for token in words.backend.get_added_tokens_decoder().values()]
    between = re.compile("|".join(tags) or "$")
    pieces = [piece for text in texts for document in text.documents for piece in between.split(document)]
    if any(other.encode(piece) != words.encode(piece) for piece in pieces):
        raise OptionError(
            f"{result.folder}: its tokenizer reads the text differently from that of {reader}: nothing "
            f"to compare"
        )


def _method(result: Source) -> QuantizationMethod:
    """The method by which the result was quantized, as far as it tells."""
    inputs = {path: inputs for path, (_, inputs) in Olmo3(result.config).quantizable().items()}
    calibrated_on = CalibratedOn.from_figures(result.folder / FIGURES)
    return QuantizationMethod.of_checkpoint(result.quantized, inputs, calibrated_on)

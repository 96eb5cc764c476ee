"""The quality card: QUALITY.md for people, quality.json for programs, and two pictures."""

import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.calibration.text import CalibratedOn
from convert.card.pictures import kl_picture, layers_picture
from convert.card.quality import HISTOGRAM_EDGES, Position, Quality
from convert.card.verdict import Quantized, advice, limits, meaning, verdict
from olmo3_mlx import __version__
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import ConvertError

SCHEMA = 1  # of quality.json; a change that breaks readers makes it 2
CARD, FIGURES = "QUALITY.md", "quality.json"
LAYERS_PICTURE, KL_PICTURE = "quality-layers.png", "quality-kl.png"
FLATTERED = "These figures flatter the result, as it was calibrated on the text that it is measured on"
_CONTEXT = 12  # tokens shown before and after one

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Measured:
    """What was measured, for the card: the names of both checkpoints, what the text is and its SHA-256, the
    tokens [N, L], the command that does it again, what turns ids into text, how the result was quantized if
    that is known, and how the original is `quantized` itself, in words, if it is.
    """

    original: str
    result: str
    text: str
    text_sha256: str
    tokens: mx.array
    command: str
    decode: Decode
    made: Quantized | None = None
    quantized: str = ""

    @property
    def flattered(self) -> bool:
        """Whether the result was calibrated on this text."""
        return self.made is not None and self.made.saw(self.text_sha256)

    @property
    def calibration(self) -> CalibratedOn | None:
        """What the result was calibrated on, if that is known."""
        return None if self.made is None else self.made.on


def called(name: str | Path) -> str:
    """What a card calls a hub id, or a folder or file: by its own name, as paths tell of their owner."""
    path = Path(name).expanduser()
    if not path.exists():
        return str(name)
    return path.resolve().name if path.name in ("", "..") else path.name


def write_card(folder: Path, quality: Quality, measured: Measured) -> list[Path]:
    """Write the card into `folder`, over an older one; the files written.

    The same figures give the same bytes. Raises ConvertError if the folder is not there or the disk does
    not take them; then none is left.
    """
    contents = {
        LAYERS_PICTURE: layers_picture(quality),
        KL_PICTURE: kl_picture(quality),
        FIGURES: (json.dumps(figures(quality, measured), indent=2, ensure_ascii=False) + "\n").encode(),
        CARD: page(quality, measured).encode(),
    }
    written = []
    for name, content in contents.items():
        try:
            path = replace_file(folder / name, lambda new, content=content: new.write_bytes(content))  # type: ignore[misc]
            path.chmod(0o644)
        except OSError as error:
            with suppress(OSError):
                remove_card(folder)
            raise ConvertError(f"{name} could not be written: {error.strerror}") from None
        written.append(path)
    return written


def remove_card(folder: Path) -> None:
    """Remove a card from `folder`, or what there is of it."""
    for name in (CARD, FIGURES, KL_PICTURE, LAYERS_PICTURE):
        (folder / name).unlink(missing_ok=True)


def figures(quality: Quality, measured: Measured) -> dict[str, Any]:
    """Every figure, for programs; pairs are [original, result]."""
    return {
        "schema": SCHEMA,
        "verdict": verdict(quality),
        "advice": list(advice(quality, measured.made)),
        "original": measured.original,
        "original_quantized": measured.quantized or None,
        "result": measured.result,
        "text": {
            "name": measured.text,
            "sha256": measured.text_sha256,
            "sequences": measured.tokens.shape[0],
            "length": measured.tokens.shape[1],
        },
        "calibration": None if measured.calibration is None else measured.calibration._asdict(),
        "command": measured.command,
        "versions": versions(),
        **asdict(quality),
        "sizes": [{**asdict(size), "bits_per_weight": size.bits_per_weight} for size in quality.sizes],
        "histogram": {"edges": HISTOGRAM_EDGES, "counts": quality.histogram},
    }


def versions() -> dict[str, str]:
    """What measured it."""
    device = str(mx.default_device().type).rpartition(".")[2]
    # GPUs that have TF32 multiply float32 in it, unless MLX is told otherwise.
    tf32 = device == "gpu" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    return {
        "olmo3-mlx": __version__,
        "mlx": metadata.version("mlx"),
        "device": device,
        "tf32": "possible" if tf32 else "off",
        "platform": f"{platform.system()} {platform.machine()}",
    }


def page(quality: Quality, measured: Measured) -> str:
    """QUALITY.md."""
    word = verdict(quality)
    sections = [
        f"# How far {_name(measured.result)} is from {_name(measured.original)}",
        f"**{word.capitalize()}**: {meaning(word)}. {_sentence(quality)}{_caution(measured)}",
        _table(quality),
        f"![KL divergence, position by position]({KL_PICTURE})",
        f"![Error of the hidden states, layer by layer]({LAYERS_PICTURE})",
        "## How it was measured",
        _method(quality, measured),
        "## Where they differ most",
        _worst(quality, measured),
        "## Layer by layer",
        _layers(quality),
    ]
    tried = advice(quality, measured.made)
    if tried:
        sections[3:3] = ["To come closer, try", "\n".join(f"- {line}" for line in tried)]
    return "\n\n".join(sections) + "\n"


def _sentence(quality: Quality) -> str:
    ours, theirs = quality.sizes
    return (
        f"It takes {theirs.bytes / ours.bytes:.0%} of the bytes, and at {quality.agreement:.1%} of "
        f"{quality.tokens:,} positions in a text its most likely next token is the original's."
    )


def _caution(measured: Measured) -> str:
    """What stands behind the verdict where that would be misread, as more paragraphs."""
    said = ""
    if measured.quantized:
        said += (
            f"\n\nThe original here is a quantized checkpoint itself ({measured.quantized}): what quantizing "
            f"lost is not in these figures."
        )
    if measured.flattered:
        said += f"\n\n{FLATTERED}."
    return said


def _table(quality: Quality) -> str:
    (ours, theirs), (before, after) = quality.sizes, quality.perplexity
    rows = [
        ("", "original", "result"),
        ("---", "---:", "---:"),
        ("size", ours.in_words, theirs.in_words),
        ("bits per weight", f"{ours.bits_per_weight:.2f}", f"{theirs.bits_per_weight:.2f}"),
        ("perplexity", f"{before:.3f}", f"{after:.3f} ({after / before - 1:+.2%})"),
        ("KL divergence, mean", "", f"{quality.kl_mean:.5f} ± {quality.kl_error:.5f} nats"),
        ("KL divergence, median", "", f"{quality.kl_median:.5f} nats"),
        ("KL divergence, 99th percentile", "", f"{quality.kl_99:.4f} nats"),
        ("KL divergence, largest", "", f"{quality.kl_max:.3f} nats"),
        ("same token most likely", "", f"{quality.agreement:.2%}"),
        (
            "change of the actual token's probability, mean",
            "",
            f"{100 * quality.probability_mean:.2f} points",
        ),
        ("… 99th percentile", "", f"{100 * quality.probability_99:.1f} points"),
    ]
    return _rows(rows)


def _method(quality: Quality, measured: Measured) -> str:
    count, length = measured.tokens.shape
    made, on = versions(), measured.calibration
    tf32 = " (matrix products perhaps in TF32)" if made["tf32"] == "possible" else ""
    calibrated = "" if on is None else f"The result was calibrated on {on.in_words}.\n\n"
    return (
        f"Both models read {count} sequences of {length:,} tokens from {measured.text} "
        f"(SHA-256 `{measured.text_sha256[:16]}…`), in float32 on the {made['device'].upper()}{tf32}, "
        f"and their predictions of every token but each sequence's first were compared: "
        f"{quality.tokens:,} in all. KL is "
        f"KL(original ‖ result) of the two distributions over the whole vocabulary; 0 is the same, and "
        f"± is one standard error. Perplexity alone can mislead, as a changed model can be better at some "
        f"tokens and worse at others; KL cannot. {limits()}\n\n"
        f"{calibrated}"
        f"This is one text. It says little about arithmetic, code, other languages, long contexts, or how "
        f"errors add up over a long answer: try what you need.\n\n"
        f"To measure the same again, run this where the folders and files are that it names:\n\n"
        f"```\n{measured.command}\n```\n\n"
        f"olmo3-mlx {made['olmo3-mlx']}, MLX {made['mlx']} ({made['device']}), {made['platform']}. "
        f"All figures are in [{FIGURES}]({FIGURES})."
    )


def _worst(quality: Quality, measured: Measured) -> str:
    if quality.kl_max == 0:
        return "Nowhere."
    rows: list[tuple[str, ...]] = [
        ("KL", "where: before **›** the token that came **‹** after", "original says", "result says"),
        ("---:", "---", "---", "---"),
    ]
    tokens = np.array(measured.tokens)
    for at in quality.worst:
        ids = tokens[at.sequence].tolist()
        before = ids[max(0, at.position - _CONTEXT) : at.position]
        after = ids[at.position + 1 : at.position + 1 + _CONTEXT]
        came, chances = code(measured.decode([at.actual])), at.actual_probability
        rows.append((
            f"{at.kl:.3f}",
            f"{code(measured.decode(before))} **›** {came} **‹** {code(measured.decode(after))}",
            *(_says(at, which, measured.decode, chances[which]) for which in (0, 1)),
        ))  # fmt: skip
    return _rows(rows)


def _says(at: Position, which: int, decode: Decode, chance: float) -> str:
    top = f"{code(decode([at.top[which]]))} {_percent(at.top_probability[which])}"
    return top if at.top[which] == at.actual else f"{top}; what came {_percent(chance)}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def _layers(quality: Quality) -> str:
    rows = [("layer", "kind", "added", "accumulated"), ("---", "---", "---:", "---:")]
    rows += [(e.name, e.kind, f"{e.added:.3%}", f"{e.accumulated:.3%}") for e in quality.layers]
    return (
        "The length of the difference between hidden states over that of the original's, averaged over "
        "positions. *Added* is what a layer does alone, given the original's states; *accumulated* is the "
        "whole model up to there. Later layers can undo errors of earlier ones.\n\n"
        f"<details><summary>{len(quality.layers)} layers</summary>\n\n{_rows(rows)}\n\n</details>"
    )


def code(text: str) -> str:
    """Text as a Markdown code span that keeps to its table cell: line ends and other control characters are
    escaped, bars too, and fences are longer than the backticks inside.
    """
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text).replace("|", "\\|")
    if not text:
        return "*nothing*"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    # Markdown takes a space off both ends where both have one, unless there is nothing else.
    pad = " " if "`" in (text[0], text[-1]) or (text[0] == text[-1] == " " and text.strip()) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _name(name: str) -> str:
    return code(Path(name).name or name)

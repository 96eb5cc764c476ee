"""QUALITY.md, the page of a quality card."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from convert.card.comparison import FLATTERED, Comparison, versions
from convert.card.markdown import code, table
from convert.card.quality import Position, Quality
from convert.card.verdict import ANCHORS, TABLE, limits, place

CARD, FIGURES = "QUALITY.md", "quality.json"
LAYERS_PICTURE, KL_PICTURE = "quality-layers.png", "quality-kl.png"
_CONTEXT = 12  # tokens shown before and after one

Decode = Callable[[Sequence[int]], str]


def page(comparison: Comparison) -> str:
    """The text of QUALITY.md."""
    quality = comparison.quality
    verdict = f"**{comparison.verdict.capitalize()}**: {comparison.meaning}."
    sections = [
        f"# How far {_name(comparison.result)} is from {_name(comparison.original)}",
        f"{verdict} {_sentence(quality)}{_caution(comparison)}",
        _figures(quality),
        _perplexity(comparison),
        f"![KL divergence, position by position]({KL_PICTURE})",
        f"![Error of the hidden states, layer by layer]({LAYERS_PICTURE})",
        "## What the word means",
        _anchors(quality),
        "## How it was measured",
        _measuring(comparison),
        "## Where they differ most",
        _worst(comparison),
        "## Layer by layer",
        _layers(quality),
    ]
    if comparison.advice:
        sections[4:4] = ["To come closer, try", "\n".join(f"- {line}" for line in comparison.advice)]
    return "\n\n".join(sections) + "\n"


def _sentence(quality: Quality) -> str:
    ours, theirs = quality.sizes
    return (
        f"It takes {theirs.bytes / ours.bytes:.0%} of the bytes, and at {quality.agreement:.1%} of "
        f"{quality.tokens:,} positions in a text its most likely next token is the original's."
    )


def _caution(comparison: Comparison) -> str:
    """Paragraphs behind the verdict where that would be misread."""
    cautions = []
    if comparison.original_quantization:
        cautions.append(
            f"The original here is a quantized checkpoint itself ({comparison.original_quantization}): what "
            f"quantizing lost is not in these figures."
        )
    if comparison.flattered:
        cautions.append(f"{FLATTERED}.")
    return "".join(f"\n\n{caution}" for caution in cautions)


def _figures(quality: Quality) -> str:
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
    return table(rows)


def _perplexity(comparison: Comparison) -> str:
    """What a reader should not make of the perplexities."""
    before, after = comparison.quality.perplexity
    return (
        f"Perplexity is on {comparison.text.described}. Other texts give other perplexities: what counts is "
        f"the ratio of the two, {after / before:.3f} here."
    )


def _anchors(quality: Quality) -> str:
    rows: list[tuple[str, ...]] = [
        ("format", "mean KL, nats", "same top token", "users are told"),
        ("---", "---:", "---:", "---"),
    ]
    rows += [
        (a.name, f"{a.kl:.4f}", "" if a.agreement is None else f"{a.agreement:.1%}", a.said) for a in ANCHORS
    ]
    return (
        f"{limits()} The lines are drawn by what is published of Llama 3 8B in the formats of llama.cpp, in "
        f"[its own table]({TABLE}): good ends behind the last format that users are recommended.\n\n"
        f"{table(rows)}\n\n"
        f"The mean KL here, {quality.kl_mean:.4f}, lies {place(quality.kl_mean)}. That places it, no more: "
        f"the table is of another model and another text (Wikitext-2). A small model's KL is not a large "
        f"one's, as it loses more at the same bits; and models of one size differ: Llama 2 7B has 0.013 in "
        f"q4_K_M."
    )


def _measuring(comparison: Comparison) -> str:
    count, length = comparison.text.tokens.shape
    used, calibrated_on = versions(), comparison.calibrated_on
    tf32 = " (matrix products perhaps in TF32)" if used["tf32"] == "possible" else ""
    calibrated = (
        "" if calibrated_on is None else f"The result was calibrated on {calibrated_on.in_words}.\n\n"
    )
    return (
        f"Both models read {count} sequences of {length:,} tokens from {comparison.text.described}, "
        f"SHA-256 `{comparison.text.sha256[:16]}…`, in float32 on the {used['device'].upper()}{tf32}, "
        f"and their predictions of every token but each sequence's first were compared: "
        f"{comparison.quality.tokens:,} in all. KL is "
        f"KL(original ‖ result) of the two distributions over the whole vocabulary; 0 is the same, and "
        f"± is one standard error. Perplexity alone can mislead, as a changed model can be better at some "
        f"tokens and worse at others; KL cannot.\n\n"
        f"{calibrated}"
        f"This is one text. It says little about arithmetic, code, other languages, long contexts, or how "
        f"errors add up over a long answer: try what you need.\n\n"
        f"To measure the same again, run this where the folders and files are that it names:\n\n"
        f"```\n{comparison.command}\n```\n\n"
        f"olmo3-mlx {used['olmo3-mlx']}, MLX {used['mlx']} ({used['device']}), {used['platform']}. "
        f"All figures are in [{FIGURES}]({FIGURES})."
    )


def _worst(comparison: Comparison) -> str:
    quality, decode = comparison.quality, comparison.text.decode
    if quality.kl_max == 0:
        return "Nowhere."
    rows: list[tuple[str, ...]] = [
        ("KL", "where: before **›** the token that came **‹** after", "original says", "result says"),
        ("---:", "---", "---", "---"),
    ]
    tokens = np.array(comparison.text.tokens)
    for at in quality.worst:
        ids = tokens[at.sequence].tolist()
        before = ids[max(0, at.position - _CONTEXT) : at.position]
        after = ids[at.position + 1 : at.position + 1 + _CONTEXT]
        came, chances = code(decode([at.actual])), at.actual_probability
        rows.append((
            f"{at.kl:.3f}",
            f"{code(decode(before))} **›** {came} **‹** {code(decode(after))}",
            *(_says(at, which, decode, chances[which]) for which in (0, 1)),
        ))  # fmt: skip
    return table(rows)


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
        f"<details><summary>{len(quality.layers)} layers</summary>\n\n{table(rows)}\n\n</details>"
    )


def _name(name: str) -> str:
    return code(Path(name).name or name)

"""QUALITY.md, the page of a quality card."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from convert.calibration.text import CalibratedOn
from convert.card.comparison import FLATTERED, Comparison, versions
from convert.card.markdown import code, named, table, texts_table
from convert.card.quality import RUN, Figures, Position, Quality
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
        f"{verdict} {_decided(comparison)}{_sentence(quality)}{_caution(comparison)}",
        _sizes(quality),
        _kinds(quality),
        _remarks(quality),
        f"![KL divergence, position by position]({KL_PICTURE})",
        f"![Error of the hidden states, layer by layer]({LAYERS_PICTURE})",
        "## What the word means",
        _anchors(comparison),
        "## How it was measured",
        _measuring(comparison),
        "## Where they differ most",
        _worst(comparison),
        "## Layer by layer",
        _layers(quality),
    ]
    if comparison.advice:
        sections[5:5] = ["To come closer, try", "\n".join(f"- {line}" for line in comparison.advice)]
    return "\n\n".join(sections) + "\n"


def _decided(comparison: Comparison) -> str:
    """The kind of text that the verdict is about, if there are several."""
    kind = comparison.said_of
    return f"That is said of {named(kind)}, the kind of text on which it is farthest off. " if kind else ""


def _sentence(quality: Quality) -> str:
    ours, theirs = quality.sizes
    return (
        f"It takes {theirs.bytes / ours.bytes:.0%} of the bytes, and at {quality.agreement:.1%} of "
        f"{quality.tokens:,} positions in texts its most likely next token is the original's."
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


def _sizes(quality: Quality) -> str:
    ours, theirs = quality.sizes
    rows = [
        ("", "original", "result"),
        ("---", "---:", "---:"),
        ("size", ours.in_words, theirs.in_words),
        ("bits per weight", f"{ours.bits_per_weight:.2f}", f"{theirs.bits_per_weight:.2f}"),
    ]
    return table(rows)


def _kinds(quality: Quality) -> str:
    """A row for each kind of text, and one for all of them if there are several."""
    rows: list[tuple[str, ...]] = [
        (
            "text",
            "KL, mean (nats)",
            "median",
            "99th percentile",
            "99.9th",
            "same top token",
            "perplexity, ratio",
        ),
        ("---", *["---:"] * 6),
    ]
    rows += [(named(kind), *_cells(figures)) for kind, figures in quality.kinds.items()]
    if len(quality.kinds) > 1:
        rows.append(("*all*", *_cells(quality)))
    return table(rows)


def _cells(figures: Figures) -> tuple[str, ...]:
    before, after = figures.perplexity
    return (
        f"{figures.kl_mean:.5f} ± {figures.kl_error:.5f}",
        f"{figures.kl_median:.5f} ± {figures.kl_median_error:.5f}",
        f"{figures.kl_99:.4f} ± {figures.kl_99_error:.4f}",
        f"{figures.kl_999:.3f} ± {figures.kl_999_error:.3f}",
        f"{figures.agreement:.2%} ± {figures.agreement_error:.2%}",
        f"{figures.perplexity_ratio:.4f} ± {figures.perplexity_ratio_error:.4f} ({before:.3f} → {after:.3f})",
    )


def _remarks(quality: Quality) -> str:
    """What stands in no table, and what a reader should not make of the perplexities."""
    fewest = min(figures.tokens for figures in quality.kinds.values())
    behind = max(1, round(fewest / 1000))
    rests = f"the {behind} largest values" if behind > 1 else "the largest value alone"
    return (
        f"± is one standard error; the 99.9th percentile of {fewest:,} positions rests on {rests}. The "
        f"largest KL anywhere is {quality.kl_max:.3f} nats. The probability of the token that came "
        f"changes by {100 * quality.probability_mean:.2f} points on average, and by "
        f"{100 * quality.probability_99:.1f} at the 99th percentile. Other texts give other perplexities: "
        f"what counts is the ratio of the two."
    )


def _anchors(comparison: Comparison) -> str:
    kind = comparison.decided_by
    worst = comparison.quality.kinds[kind]
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
        f"The mean KL on {named(kind)}, {worst.kl_mean:.4f}, lies {place(worst.kl_mean)}. That places "
        f"it, no more: the table is of another model and another text (Wikitext-2). A small model's KL "
        f"is not a large one's, as it loses more at the same bits; and models of one size differ: "
        f"Llama 2 7B has 0.013 in q4_K_M."
    )


def _measuring(comparison: Comparison) -> str:
    count, length = comparison.texts.tokens.shape
    used = versions()
    tf32 = " (matrix products perhaps in TF32)" if used["tf32"] == "possible" else ""
    few = len(comparison.texts.texts) == 1
    return (
        f"Both models read the same {count} sequences of {length:,} tokens, each without context, "
        f"in float32 on the {used['device'].upper()}{tf32}, "
        f"and their predictions of every token but each sequence's first were compared: "
        f"{comparison.quality.tokens:,} in all. KL is KL(original ‖ result) of the two distributions "
        f"over the whole vocabulary; 0 is the same. Errors count {RUN} neighbouring positions as one. "
        f"Bits per weight are all bytes of the tensors, scales included, over all weights. Perplexity "
        f"alone can mislead, as a changed model can be better at some tokens and worse at others; KL "
        f"cannot.\n\n"
        f"{texts_table(comparison.texts.texts)}\n\n"
        f"{_calibrated(comparison.calibrated_on)}"
        f"{'This is one text. It says' if few else 'These are few texts. They say'} little about what "
        f"is unlike {'it' if few else 'them'}, about long contexts, or how errors add up over a long "
        f"answer: try what you need.\n\n"
        f"To measure the same again, run this where the folders and files are that it names:\n\n"
        f"```\n{comparison.command}\n```\n\n"
        f"olmo3-mlx {used['olmo3-mlx']}, MLX {used['mlx']} ({used['device']}), {used['platform']}. "
        f"All figures are in [{FIGURES}]({FIGURES})."
    )


def _calibrated(on: CalibratedOn | None) -> str:
    if on is None:
        return ""
    listed = f"{texts_table(on.texts)}\n\n" if len(on.texts) > 1 else ""
    return f"The result was calibrated on {on.in_words}.\n\n{listed}"


def _worst(comparison: Comparison) -> str:
    quality, decode = comparison.quality, comparison.texts.decode
    if quality.kl_max == 0:
        return "Nowhere."
    rows: list[tuple[str, ...]] = [
        ("KL", "text", "where: before **›** the token that came **‹** after", "original says", "result says"),
        ("---:", "---", "---", "---", "---"),
    ]
    tokens = np.array(comparison.texts.tokens)
    for at in quality.worst:
        ids = tokens[at.sequence].tolist()
        before = ids[max(0, at.position - _CONTEXT) : at.position]
        after = ids[at.position + 1 : at.position + 1 + _CONTEXT]
        came, chances = code(decode([at.actual])), at.actual_probability
        rows.append((
            f"{at.kl:.3f}",
            named(at.kind),
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

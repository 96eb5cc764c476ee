"""The meaning of a card's figures in one word, and where they stand beside published ones.

The published ones are of Llama 3 8B in llama.cpp's formats, on Wikitext-2, from that project's own table:
https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md, "LLaMA 3 8b Scoreboard"
(measured at its revision f364eb6f; without importance matrices), and the agreement from the comparison of
Llama 2 and 3 below it. What users are told of each format is from the cards of TheBloke's conversions, which
many others repeat: https://huggingface.co/TheBloke/Mistral-7B-Instruct-v0.2-GGUF.
"""

from dataclasses import dataclass

from convert.card.quality import Figures, Quality

TABLE = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"


@dataclass(frozen=True)
class Anchor:
    """A published figure: a format of llama.cpp, its mean KL in nats, the share of positions with the same
    top token if that is known, and what users are told of it.
    """

    name: str
    kl: float
    agreement: float | None
    said: str


ANCHORS = (
    Anchor("q8_0", 0.001355, 0.97674, "extremely low quality loss"),
    Anchor("q6_K", 0.005452, 0.96031, "extremely low quality loss"),
    Anchor("q5_K_M", 0.010762, None, "very low quality loss, recommended"),
    Anchor("q4_K_M", 0.031273, 0.91901, "balanced quality, recommended"),
    Anchor("q4_K_S", 0.043136, None, "greater quality loss"),
    Anchor("q3_K_M", 0.101913, None, "high quality loss"),
    Anchor("q2_K", 0.445132, 0.71138, "significant quality loss, not recommended for most purposes"),
)


@dataclass(frozen=True)
class _Limit:
    kl: float  # nats a token, no more
    agreement: float  # share of positions, no less


# Good ends behind q4_K_M, the last format that is recommended; fair ends before q3_K_M, of which users are
# told that its loss is high. Agreement must hold too, as the same KL can change few top tokens or many: good
# asks for nearly q4_K_M's. At fair's KL large models have 86 % (Llama 2's q2_K, 0.109); on a hard text small
# ones have less, the lab's 79.3 % at 0.091 and 84.7 % at 0.046. See docs/decisions, 2026-11-27.
_LIMITS = {"good": _Limit(0.04, 0.90), "fair": _Limit(0.10, 0.75)}
_MEANING = {
    "identical": "both models say the same everywhere",
    "good": "most answers will be the same or as good",
    "fair": "answers will often be worded otherwise, and some will be worse",
    "poor": "much is lost: many answers will be others, and often worse ones",
}


def verdict(quality: Quality) -> str:
    """The one word: "identical", "good", "fair" or "poor". It is that of the worst kind of text, as a
    result is for all kinds that it was measured on.
    """
    return word_of(quality.kinds[deciding(quality)])


def deciding(quality: Quality) -> str:
    """The kind of text that the verdict is about: of those with the worst word, the one with the largest
    KL.
    """
    words = list(_MEANING)
    return max(quality.kinds, key=lambda kind: _rank(words, quality.kinds[kind]))


def word_of(figures: Figures) -> str:
    """The word for the figures on one kind of text."""
    if figures.kl_max == 0 and figures.agreement == 1:
        return "identical"
    for word, limit in _LIMITS.items():
        if figures.kl_mean <= limit.kl and figures.agreement >= limit.agreement:
            return word
    return "poor"


def _rank(words: list[str], figures: Figures) -> tuple[int, float]:
    """How bad figures are: by their word, from the best to the worst, then by their KL."""
    return words.index(word_of(figures)), figures.kl_mean


def meaning(word: str) -> str:
    """The meaning of a verdict for whoever uses the model, in half a sentence."""
    return _MEANING[word]


def limits() -> str:
    """A sentence on where the lines between verdicts lie."""
    good, fair = _LIMITS["good"], _LIMITS["fair"]
    return (
        f"Good is a mean KL of at most {good.kl:g} nats with at least {good.agreement:.0%} of top tokens the "
        f"same, fair {fair.kl:g} and {fair.agreement:.0%}."
    )


def place(kl: float) -> str:
    """Where a mean KL, in nats, stands among the published ones."""
    nearer = [anchor.name for anchor in ANCHORS if anchor.kl <= kl]
    farther = [anchor.name for anchor in ANCHORS if anchor.kl > kl]
    if not nearer:
        where = f"nearer than {farther[0]}"
    elif not farther:
        where = f"farther than {nearer[-1]}"
    else:
        where = f"between {nearer[-1]} and {farther[0]}"
    return f"{where} of an 8B in llama.cpp's table"

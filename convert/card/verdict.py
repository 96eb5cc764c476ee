"""The meaning of a card's figures in one word."""

from dataclasses import dataclass

from convert.card.quality import Quality


@dataclass(frozen=True)
class _Limit:
    kl: float  # nats a token, no more
    agreement: float  # share of positions, no less


# By Pinsker's inequality (and Jensen's for the mean) two models with a mean KL of k nats would draw another
# token at no more than sqrt(k / 2) of positions: 16 % at 0.05, 35 % at 0.25. On the lab's chat model 8, 6
# and 5 bits lie below the first line and answer as the original does; 4 bits lie below the second, still as
# often right, but worded otherwise; 3 bits lie far above both, and much that was right is wrong. Agreement
# must hold too: the same KL can change few top tokens or many. See docs/decisions, 2026-11-24.
_LIMITS = {"good": _Limit(0.05, 0.80), "fair": _Limit(0.25, 0.65)}
_MEANING = {
    "identical": "both models say the same everywhere",
    "good": "most answers will be the same or as good",
    "fair": "answers will often be worded otherwise, and some will be worse",
    "poor": "in effect this is another model",
}


def verdict(quality: Quality) -> str:
    """The one word: "identical", "good", "fair" or "poor"."""
    if quality.kl_max == 0 and quality.agreement == 1:
        return "identical"
    for word, limit in _LIMITS.items():
        if quality.kl_mean <= limit.kl and quality.agreement >= limit.agreement:
            return word
    return "poor"


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

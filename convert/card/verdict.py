"""What the figures mean: one word, and what to try next."""

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
# must hold too: the same KL can change few top tokens or many. See Decisions in CONTRIBUTING.md,
# 2026-11-24.
_LIMITS = {"good": _Limit(0.05, 0.80), "fair": _Limit(0.25, 0.65)}
_MEANING = {
    "identical": "both models say the same everywhere",
    "good": "most answers will be the same or as good",
    "fair": "answers will often be worded otherwise, and some will be worse",
    "poor": "in effect this is another model",
}


def verdict(quality: Quality) -> str:
    """ "identical", "good", "fair" or "poor"."""
    if quality.kl_max == 0 and quality.agreement == 1:
        return "identical"
    for word, limit in _LIMITS.items():
        if quality.kl_mean <= limit.kl and quality.agreement >= limit.agreement:
            return word
    return "poor"


def meaning(word: str) -> str:
    """What a verdict means for whoever uses the model, in half a sentence."""
    return _MEANING[word]


def limits() -> str:
    """Where the lines between verdicts lie, in a sentence."""
    good, fair = _LIMITS["good"], _LIMITS["fair"]
    return (
        f"Good is a mean KL of at most {good.kl:g} nats with at least {good.agreement:.0%} of top tokens the "
        f"same, fair {fair.kl:g} and {fair.agreement:.0%}."
    )


def advice(quality: Quality) -> tuple[str, ...]:
    """What to try if a quantized result is not good enough, the most promising first. Nothing if it takes as
    many bits as the original: then it is another stage of training.
    """
    before, bits = (size.bits_per_weight for size in quality.sizes)
    if verdict(quality) in ("identical", "good") or bits >= before:
        return ()
    tried = []
    if bits < 8:
        more = next(b for b in (3, 4, 5, 6, 8) if b > bits)
        tried.append(f"more bits: `--bits {more}` (this one has {bits:.2f} bits per weight)")
    tried.append("smaller groups: `--group-size 32`, half a bit more than 64")
    tried.append("`--calibrate`, which rounds to suit a text rather than each weight to its nearest")
    added = sorted(quality.layers, key=lambda e: -e.added)
    if added[0].added > 2 * added[len(added) // 2].added:
        worst = ", ".join(e.name for e in added[:2])
        tried.append(f"`--recipe`, with more bits where most is lost: {worst}")
    tried.append("`--target-bpw`, which spends bits on the layers that need them")
    return tuple(tried)

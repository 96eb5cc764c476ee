"""What the figures mean: one word, and what to try next."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from convert.calibration.text import CalibratedOn
from convert.card.quality import Quality
from olmo3_mlx.quantization import Quantization


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


@dataclass(frozen=True)
class Quantized:
    """How a result was quantized: `layers` by their paths. What chose their bits, `by`, is "bits", of which
    there were `bits`, a "recipe" or a "target"; "" and a `calibrated` of None mean that nobody knows.
    `on` is the text that it was calibrated on, if that is known, and
    `left_out` are the inputs of layers that are not quantized as no group divides them, by path.
    """

    layers: Mapping[str, Quantization]
    by: str = ""
    bits: int | None = None
    calibrated: bool | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    on: CalibratedOn | None = None

    @classmethod
    def found(
        cls, layers: Mapping[str, Quantization], inputs: Mapping[str, int], on: CalibratedOn | None
    ) -> "Quantized":
        """What a checkpoint tells: how `layers` are quantized, of all that could be, with their `inputs`."""
        made = cls(layers, calibrated=None if on is None else True, on=on)
        rest = {path: n for path, n in inputs.items() if path not in layers and n % made.group_size}
        return replace(made, left_out=rest)

    def saw(self, sha256: str) -> bool:
        """Whether it was calibrated on the text with this SHA-256, so that figures from that flatter it."""
        return self.on is not None and self.on.sha256 == sha256

    @property
    def chosen(self) -> bool:
        """Whether calibration chose bits and groups layer by layer."""
        return bool(self.calibrated) and self.by in ("bits", "target")

    @property
    def affine(self) -> bool:
        """Whether all layers are."""
        return all(how.mode == "affine" for how in self.layers.values())

    @property
    def group_size(self) -> int:
        """The largest, 64 if nobody knows."""
        return max((how.group_size for how in self.layers.values()), default=64)

    def can_grow(self, path: str = "model") -> bool:
        """Whether a layer at or below a path could have more bits than it has."""
        below = [how.bits for name, how in self.layers.items() if f"{name}.".startswith(f"{path}.")]
        return not self.layers or min(below, default=8) < 8


def advice(quality: Quality, made: Quantized | None = None) -> tuple[str, ...]:
    """What to try if a quantized result, `made` so, is not good enough, the most promising first: nothing
    that was done, or that cannot be. Nothing at all if it takes as many bits as the original, or is not
    quantized: then it is another stage of training.
    """
    before, bits = (size.bits_per_weight for size in quality.sizes)
    if verdict(quality) in ("identical", "good") or bits >= before or (made and not made.layers):
        return ()
    made = made or Quantized({})
    tried = [*_more_bits(made, bits), *_smaller_groups(made)]
    if not made.calibrated and made.affine:
        unless = "" if made.calibrated is False else ", unless it was"
        tried.append(
            f"`--calibrate`{unless}, which rounds to suit a text rather than each weight to its nearest"
        )
    return (*tried, *_where_most_is_lost(quality, made))


def _more_bits(made: Quantized, size: float) -> Iterator[str]:
    """`size` is in bits per weight."""
    has = f"(this one has {size:.2f} bits per weight)"
    kinds = {how.bits for how in made.layers.values()}
    now = made.bits or (kinds.pop() if len(kinds) == 1 else size)
    if not made.affine:
        yield f"`--bits {5 if now < 5 else 8}` in affine mode, which can also be calibrated {has}"
    elif made.by == "recipe":
        if made.can_grow():
            yield f"more bits in the recipe {has}"
    elif made.by == "target" or (made.chosen and now >= 8):
        if made.can_grow() or made.group_size > 32:
            yield f"more bits: a larger `--target-bpw` {has}"
    elif now < 8 and made.can_grow():
        yield f"more bits: `--bits {next(b for b in (3, 4, 5, 6, 8) if b > now)}` {has}"


def _smaller_groups(made: Quantized) -> Iterator[str]:
    if made.chosen or not made.affine or made.group_size <= 32:
        return
    smaller = [size for size in (64, 32) if size < made.group_size]
    divided = {size: [path for path, n in made.left_out.items() if n % size == 0] for size in smaller}
    size = max(smaller, key=lambda size: len(divided[size]))
    recipe = made.by == "recipe"
    if divided[size]:  # then the result is smaller, and by itself no better
        if made.can_grow():
            groups = f"groups of {size} in the recipe" if recipe else f"`--group-size {size}`"
            kinds = ", ".join(sorted({f"`{path.rpartition('.')[2]}`" for path in divided[size]}))
            yield f"{groups} with more bits: {size} divides the inputs of {kinds} too, not quantized so far"
    elif recipe:
        yield f"smaller groups in the recipe than {made.group_size}"
    else:
        more = {64: "half", 128: "a quarter of"}[made.group_size]
        price = "" if made.left_out else f", {more} a bit more than {made.group_size}"
        yield f"smaller groups: `--group-size {size}`{price}"


def _where_most_is_lost(quality: Quality, made: Quantized) -> Iterator[str]:
    if made.chosen or not made.affine or not made.can_grow():
        return
    added = sorted(quality.layers, key=lambda e: -e.added)
    worst = [e.name for e in added[:2] if made.can_grow(f"model.{e.name}")]
    if worst and added[0].added > 2 * added[len(added) // 2].added:
        where = "in the recipe" if made.by == "recipe" else "by a `--recipe`"
        yield f"more bits {where} where most is lost: {', '.join(worst)}"
    instead = " instead of the recipe" if made.by == "recipe" else ""
    yield f"`--target-bpw`{instead}, which spends bits on the layers that need them"

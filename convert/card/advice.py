"""Advice on what to try if a quantized result is not good enough."""

from collections.abc import Iterator

from convert.card.method import QuantizationMethod
from convert.card.quality import Quality
from convert.card.verdict import verdict
from convert.target import GB, OPTIONS


def advice(quality: Quality, method: QuantizationMethod | None = None) -> tuple[str, ...]:
    """What to try if a result that was quantized by `method` is not good enough, the most promising first.

    Nothing is advised that was done, or that cannot be. There is no advice at all on a result that takes as
    many bits as the original, or is not quantized: then it is another stage of training.
    """
    before, bits = (size.bits_per_weight for size in quality.sizes)
    if verdict(quality) in ("identical", "good") or bits >= before or (method and not method.layers):
        return ()
    method = method or QuantizationMethod({})
    tried = [*_more_bits(method, bits), *_smaller_groups(method)]
    if not method.calibrated and method.affine:
        unless = "" if method.calibrated is False else ", unless it was"
        tried.append(
            f"`--calibrate`{unless}, which rounds to suit a text rather than each weight to its nearest"
        )
    return (*tried, *_where_most_is_lost(quality, method))


def _more_bits(method: QuantizationMethod, size: float) -> Iterator[str]:
    """`size` is in bits per weight."""
    has = f"(this one has {size:.2f} bits per weight)"
    kinds = {scheme.bits for scheme in method.layers.values()}
    now = method.bits or (kinds.pop() if len(kinds) == 1 else size)
    if not method.affine:
        yield f"`--bits {5 if now < 5 else 8}` in affine mode, which can also be calibrated {has}"
    elif method.chosen_by == "recipe":
        if method.can_grow():
            yield f"more bits in the recipe {has}"
    elif method.chosen_by in OPTIONS or (method.weighed and now >= 8):
        if method.can_grow() or method.group_size > 32:
            flag = "--target-gb" if method.chosen_by == GB else "--target-bpw"
            yield f"more bits: a larger `{flag}` {has}"
    elif now < 8 and method.can_grow():
        yield f"more bits: `--bits {next(b for b in (3, 4, 5, 6, 8) if b > now)}` {has}"


def _smaller_groups(method: QuantizationMethod) -> Iterator[str]:
    if method.weighed or not method.affine or method.group_size <= 32:
        return
    smaller = [size for size in (64, 32) if size < method.group_size]
    divided = {size: [path for path, n in method.left_out.items() if n % size == 0] for size in smaller}
    size = max(smaller, key=lambda size: len(divided[size]))
    recipe = method.chosen_by == "recipe"
    if divided[size]:  # then the result is smaller, and by itself no better
        if method.can_grow():
            groups = f"groups of {size} in the recipe" if recipe else f"`--group-size {size}`"
            kinds = ", ".join(sorted({f"`{path.rpartition('.')[2]}`" for path in divided[size]}))
            yield f"{groups} with more bits: {size} divides the inputs of {kinds} too, not quantized so far"
    elif recipe:
        yield f"smaller groups in the recipe than {method.group_size}"
    else:
        more = {64: "half", 128: "a quarter of"}[method.group_size]
        price = "" if method.left_out else f", {more} a bit more than {method.group_size}"
        yield f"smaller groups: `--group-size {size}`{price}"


def _where_most_is_lost(quality: Quality, method: QuantizationMethod) -> Iterator[str]:
    if method.weighed or not method.affine or not method.can_grow():
        return
    added = sorted(quality.layers, key=lambda e: -e.added)
    worst = [e.name for e in added[:2] if method.can_grow(f"model.{e.name}")]
    if worst and added[0].added > 2 * added[len(added) // 2].added:
        where = "in the recipe" if method.chosen_by == "recipe" else "by a `--recipe`"
        yield f"more bits {where} where most is lost: {', '.join(worst)}"
    instead = " instead of the recipe" if method.chosen_by == "recipe" else ""
    yield f"`--target-bpw`{instead}, which spends bits on the layers that need them"

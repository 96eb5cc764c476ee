"""The small drawings under docs/architecture.svg: who sees whom, heads, positions."""

import math

from svg import circle, path, rect, text

from olmo3_mlx.config import FULL, SLIDING, Olmo3Config
from olmo3_mlx.published import SIZES
from olmo3_mlx.rope import inverse_frequencies

SEVEN, LARGE = (Olmo3Config.from_dict(SIZES[size]) for size in ("7b", "32b"))


def masks(left: float, top: float) -> list[str]:
    """Who sees whom, on a text of a dozen tokens and a window of four."""
    shapes, count, window, step = [], 12, 4, 12
    for x, kind, reach in ((left, "sliding", window), (left + 172, "full", count)):
        for row in range(count):
            for column in range(count):
                seen = column <= row < column + reach
                shapes.append(
                    rect(x + step * column, top + step * row, step - 2, step - 2, kind if seen else "cell")
                )
        shapes.append(text(x + step * count / 2, top + step * count + 22, kind, f"on-{kind}"))
    return [
        *shapes,
        text(
            left,
            top + 196,
            f"Rows look at columns. The window is {SEVEN.sliding_window:,}",
            "small",
            anchor="start",
        ),
        text(left, top + 215, "tokens; four are drawn.", "small", anchor="start"),
    ]


def heads(left: float, top: float) -> list[str]:
    """Query heads above the key-value heads that they share."""
    shapes = []
    for y, config, name, kind in (
        (top, SEVEN, "7B", "multi-head"),
        (top + 112, LARGE, "32B", "grouped-query"),
    ):
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        each, step = queries // keys, 324 / max(queries, SEVEN.num_attention_heads)
        shapes += [text(left, y + 2, f"{name}, {kind}: {queries} query heads,", "small", anchor="start")]
        shapes += [text(left, y + 20, f"{keys} key-value heads", "small", anchor="start")]
        for group in range(keys):
            middle = left + step * (each * group + each / 2)
            for head in range(each):
                x = left + step * (each * group + head + 0.5)
                shapes += [path([(x, y + 36), (middle, y + 70)], "grid"), circle(x, y + 36, 3.2, "dot")]
            shapes.append(
                rect(middle - min(step * each / 2 - 1.5, 9), y + 66, min(step * each - 3, 18), 9, "sliding")
            )
    return shapes


def turns(left: float, top: float) -> list[str]:
    """How many tokens each pair of dimensions takes for a turn, with plain RoPE and with YaRN."""
    width, height, low, high = 250, 150, math.log10(6), math.log10(3e7)

    def at(pair: int, tokens: float) -> tuple[float, float]:
        across = pair / (SEVEN.head_dim // 2 - 1)
        return left + 62 + width * across, top + height * (1 - (math.log10(tokens) - low) / (high - low))

    shapes = []
    original = SEVEN.rope[FULL].original_max_position_embeddings
    marks = (
        (10, "10"),
        (original, f"{original:,}"),
        (SEVEN.max_position_embeddings, f"{SEVEN.max_position_embeddings:,}"),
    )
    for tokens, said in (*marks, (10**7, "10 M")):
        (x, y), (end, _) = at(0, tokens), at(SEVEN.head_dim // 2 - 1, tokens)
        shapes += [path([(x, y), (end, y)], "grid"), text(x - 8, y + 4.5, said, "small", anchor="end")]
    for kind, name in ((FULL, "full"), (SLIDING, "sliding")):
        frequencies = inverse_frequencies(SEVEN.rope[kind], SEVEN.head_dim)
        shapes.append(path([at(i, 2 * math.pi / f) for i, f in enumerate(frequencies)], f"curve-{name}"))
    return [
        *shapes,
        text(*at(33, 2.2e6), "YaRN", "on-full", anchor="end"),
        text(*at(42, 4.2e3), "plain", "on-sliding", anchor="start"),
        text(left, top + 196, "Tokens for one turn of each of the 64 pairs: on", "small", anchor="start"),
        text(
            left,
            top + 215,
            f"full layers YaRN makes slow ones {SEVEN.rope[FULL].factor:g} times slower.",
            "small",
            anchor="start",
        ),
    ]

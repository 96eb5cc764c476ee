"""Draws docs/architecture.svg: Olmo 3 as a picture, every number taken from the published configs.

python docs/architecture.py
"""

from pathlib import Path

from architecture_details import LARGE, SEVEN, heads, masks, turns
from svg import MONO, SANS, circle, document, path, rect, text

from olmo3_mlx.config import FULL, SLIDING, Olmo3Config
from olmo3_mlx.memory.sizes import layer_counts, parameters_by_part

WIDTH, HEIGHT = 1200, 1250
STYLE = f"""
text {{ font: 15px {SANS}; fill: #2b2f36; }}
.name {{ font: 600 16px {MONO}; }}
.small {{ font-size: 13.5px; fill: #5f6773; }} .head {{ font: 600 19px {SANS}; }}
.title {{ font: 700 30px {SANS}; }} .lead {{ font-size: 17px; fill: #5f6773; }}
.op {{ font: 600 19px {SANS}; }}
.on-sliding {{ font-weight: 600; fill: #0f766e; }} .on-full {{ font-weight: 600; fill: #c2410c; }}
.paper {{ fill: #fcfbf8; stroke: #dcd9d0; }} .panel {{ fill: #fff; stroke: #e2dfd7; }}
.sliding {{ fill: #14958a; }} .full {{ fill: #ee7236; }}
.box {{ fill: #eef1f6; stroke: #b6bfcc; }} .norm {{ fill: #e9e3f7; stroke: #a494d6; }}
.pale-sliding {{ fill: #def3f0; stroke: #79c4bb; }} .pale-full {{ fill: #fdeadf; stroke: #f0ab86; }}
.line {{ fill: none; stroke: #7a8391; stroke-width: 1.8; }}
.residual {{ fill: none; stroke: #2b2f36; stroke-width: 2.6; }}
.plus {{ fill: #fff; stroke: #2b2f36; stroke-width: 2; }} .zoom {{ fill: #14958a; fill-opacity: 0.1; }}
.curve-sliding {{ fill: none; stroke: #14958a; stroke-width: 3; }}
.curve-full {{ fill: none; stroke: #ee7236; stroke-width: 3; }}
.grid {{ fill: none; stroke: #d6d9de; stroke-width: 1; }} .cell {{ fill: #eceef1; }} .dot {{ fill: #55606f; }}
"""
ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="#7a8391"/></marker></defs>'
)


def both(seven: float, large: float) -> str:
    """One number, or that of both sizes."""
    return f"{seven:,}" if seven == large else f"{seven:,} · {large:,}"


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> list[str]:
    """A box around x whose first line is a name in the checkpoint."""
    first = y + height / 2 + 5.5 - 9.5 * (len(lines) - 1)
    said = [text(x, first + 19 * i, line, "name" if i == 0 else "small") for i, line in enumerate(lines)]
    return [rect(x - width / 2, y, width, height, kind, radius=7), *said]


def arrow(*points: tuple[float, float]) -> str:
    """A line that ends in a head."""
    return path(list(points), "line", arrow=True)


def stack(config: Olmo3Config, name: str, x: float, top: float) -> list[str]:
    """The whole model around x: a stripe for each block, as wide as its hidden size."""
    width, step = config.hidden_size / 40, 8
    bottom = top + 92 + step * config.num_hidden_layers
    total = sum(parameters_by_part(config).values())
    stripes = [
        rect(x - width / 2, top + 92 + step * i, width, step - 2, "full" if kind == FULL else "sliding")
        for i, kind in enumerate(config.layer_types)
    ]
    return [
        text(x, top - 34, name, "head"),
        text(x, top - 14, f"{total / 1e9:.2f} B parameters", "small"),
        *box(x, top, 148, 52, "box", "embed_tokens", f"{config.vocab_size:,} × {config.hidden_size:,}"),
        arrow((x, top + 54), (x, top + 86)),
        *stripes,
        arrow((x, bottom), (x, bottom + 26)),
        *box(x, bottom + 28, 148, 28, "norm", "norm"),
        arrow((x, bottom + 57), (x, bottom + 80)),
        *box(x, bottom + 82, 148, 52, "box", "lm_head", f"{config.hidden_size:,} × {config.vocab_size:,}"),
    ]


def notes(x: float, y: float, *lines: str) -> list[str]:
    """Small print, line by line."""
    return [text(x, y + 20 * i, line, "small", anchor="start") for i, line in enumerate(lines)]


def legend(x: float, y: float) -> list[str]:
    """What the stripes mean."""
    sliding, full = layer_counts(SEVEN)
    each = f"{sliding // full} sliding + {full // full} full"
    return [
        rect(x, y, 22, 12, "sliding", radius=2),
        text(x + 30, y + 11, "sliding block", "on-sliding", anchor="start"),
        rect(x, y + 24, 22, 12, "full", radius=2),
        text(x + 30, y + 35, "full block", "on-full", anchor="start"),
        text(x, y + 64, f"{each}, × {full}", "small", anchor="start"),
        text(x, y + 84, f"in the 32B × {layer_counts(LARGE)[1]}", "small", anchor="start"),
        text(x, y + 112, "width: hidden size", "small", anchor="start"),
    ]


def block(x: float, top: float) -> list[str]:
    """One block, its residual line at x."""
    side = x + 138
    widths = [f"{c.hidden_size:,} → {c.intermediate_size:,} → {c.hidden_size:,}" for c in (SEVEN, LARGE)]

    def branch(y: float, shapes: list[str], end: float) -> list[str]:
        """From the residual line through something and a norm, and back."""
        return [
            arrow((x, y), (side, y), (side, y + 26)),
            *shapes,
            arrow((side, end), (x + 16, end)),
            circle(x, end, 14, "plus"),
            text(x, end + 6.5, "+", "op"),
        ]

    return [
        path([(x, top), (x, top + 560)], "residual"),
        text(x, top - 10, "x"),
        *branch(
            top + 22,
            [
                *box(side, top + 50, 216, 64, "box", "self_attn", "sliding or full"),
                arrow((side, top + 115), (side, top + 143)),
                *box(side, top + 145, 216, 52, "norm", "RMSNorm", "post_attention_layernorm"),
                path([(side, top + 197), (side, top + 238)], "line"),
            ],
            top + 238,
        ),
        *branch(
            top + 284,
            [
                *box(side, top + 312, 216, 84, "box", "mlp: SwiGLU", *widths),
                arrow((side, top + 397), (side, top + 421)),
                *box(side, top + 423, 216, 52, "norm", "RMSNorm", "post_feedforward_layernorm"),
                path([(side, top + 475), (side, top + 516)], "line"),
            ],
            top + 516,
        ),
        arrow((x, top + 556), (x, top + 574)),
        text(x, top + 594, "x"),
        rect(x - 26, top + 622, 290, 84, "norm", radius=7),
        *notes(
            x - 10,
            top + 647,
            "Nothing is normalised on its way in.",
            "What a block puts out is normalised,",
            "then added.",
        ),
    ]


def chips(x: float, y: float, width: float, sliding: str, full: str) -> list[str]:
    """What sliding and full layers do differently, one under the other."""
    return [
        rect(x, y, width, 30, "pale-sliding", radius=6),
        text(x + 10, y + 20, sliding, "on-sliding", anchor="start"),
        rect(x, y + 36, width, 30, "pale-full", radius=6),
        text(x + 10, y + 56, full, "on-full", anchor="start"),
    ]


def attention(left: float, top: float) -> list[str]:
    """What self_attn does, top to bottom."""
    q, k, v, middle = left + 62, left + 198, left + 334, left + 198
    keys = both(*(c.num_key_value_heads * c.head_dim for c in (SEVEN, LARGE)))
    queries = both(*(c.num_attention_heads * c.head_dim for c in (SEVEN, LARGE)))
    yarn, plain = SEVEN.rope[FULL], SEVEN.rope[SLIDING]
    shapes = [text(middle, top - 10, "x"), path([(middle, top), (middle, top + 14)], "line")]
    for x, name, width in ((q, "q_proj", queries), (k, "k_proj", keys), (v, "v_proj", keys)):
        shapes += [arrow((middle, top + 14), (x, top + 14), (x, top + 32))]
        shapes += box(x, top + 34, 124, 52, "box", name, width)
    for x, name, width in ((q, "q_norm", queries), (k, "k_norm", keys)):
        shapes += [arrow((x, top + 87), (x, top + 108)), *box(x, top + 110, 124, 52, "norm", name, width)]
        shapes += [arrow((x, top + 163), (x, top + 184)), arrow((x, top + 218), (x, top + 239))]
        shapes.append(arrow((x, top + 309), (x, top + 358)))
    return [
        *shapes,
        arrow((v, top + 87), (v, top + 184)),
        rect(left, top + 186, 396, 31, "box", radius=7),
        text(middle, top + 206.5, f"split into heads of {SEVEN.head_dim}"),
        *chips(
            left,
            top + 241,
            264,
            f"plain RoPE, θ {plain.theta:,.0f}",
            f"YaRN × {yarn.factor:g} from {yarn.original_max_position_embeddings:,} tokens",
        ),
        arrow((v, top + 218), (v, top + 358)),
        *chips(
            left,
            top + 360,
            396,
            f"sees itself and the {SEVEN.sliding_window - 1:,} before it",
            f"sees all before it; scores × {yarn.attention_factor:.4f}²",
        ),
        arrow((middle, top + 428), (middle, top + 456)),
        *box(middle, top + 458, 124, 52, "box", "o_proj", queries),
        arrow((middle, top + 511), (middle, top + 536)),
        text(middle, top + 556, "to the norm behind it", "small"),
        rect(left, top + 622, 396, 84, "norm", radius=7),
        *notes(
            left + 16,
            top + 647,
            "q_norm and k_norm span the whole projection.",
            "YaRN is for full blocks only: its attention factor enters",
            "their softmax scale, squared.",
        ),
        *notes(left, top + 592, "Two numbers are the 7B's · the 32B's."),
    ]


def picture() -> str:
    """The whole picture."""
    tower = 190
    stripe = tower + 92 + 8 * 4
    panels = (
        (402, 112, 330, 816),
        (754, 112, 420, 816),
        (26, 952, 360, 272),
        (408, 952, 372, 272),
        (802, 952, 372, 272),
    )
    shapes = [
        ARROW,
        rect(1, 1, WIDTH - 2, HEIGHT - 2, "paper", radius=16),
        text(34, 52, "Olmo 3", "title", anchor="start"),
        text(
            34, 82, "norms after, not before; three sliding blocks, then a full one", "lead", anchor="start"
        ),
        path([(326, stripe), (402, 112 + 14), (402, 928 - 14), (326, stripe + 6)], "zoom", closed=True),
        *(rect(*panel, "panel", radius=12) for panel in panels),
        *stack(SEVEN, "7B", 108, tower),
        *stack(LARGE, "32B", 270, tower),
        *legend(40, 730),
        text(424, 144, "One block", "head", anchor="start"),
        *block(450, 190),
        text(776, 144, "Its attention", "head", anchor="start"),
        *attention(768, 190),
        text(46, 984, "Who sees whom", "head", anchor="start"),
        *masks(46, 1000),
        text(428, 984, "Heads", "head", anchor="start"),
        *heads(432, 1012),
        text(822, 984, "Positions", "head", anchor="start"),
        *turns(822, 1000),
    ]
    return document(WIDTH, HEIGHT, "The architecture of Olmo 3, 7B and 32B", STYLE, shapes)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")

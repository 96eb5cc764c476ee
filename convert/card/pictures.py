"""The card's two pictures. On light paper, so that they can be read on white and on dark pages."""

from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from convert.card.quality import HISTOGRAM_EDGES, LayerError, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAPER, _INK, _FAINT, _GRID = "#fbfaf7", "#23303a", "#6b7780", "#e4e1d9"
_EMBEDDING, _SLIDING, _FULL, _LINE = "#c9c3b4", "#8fb8c9", "#2f6f8f", "#d1495b"
_COLOURS = {"embedding": _EMBEDDING, "sliding": _SLIDING, "full": _FULL}


def layers_picture(quality: Quality) -> bytes:
    """A PNG: what each layer adds to the error of the hidden states, and what has accumulated after it."""
    figure, axes = _sheet("Error of the hidden states, layer by layer")
    errors, count = quality.layers, len(quality.layers)
    added = [100 * e.added for e in errors]
    colours = [_COLOURS[e.kind] for e in errors]
    axes.bar(range(count), added, width=0.72, color=colours, zorder=2)
    axes.plot(
        range(count), [100 * e.accumulated for e in errors], color=_LINE, linewidth=2, marker="o",
        markersize=4.5 if count < 24 else 2.5, markeredgecolor=_PAPER, markeredgewidth=0.6, zorder=3,
    )  # fmt: skip
    step = 1 if count <= 20 else 4 if count <= 40 else 8
    ticks = [0, *range(1 if step == 1 else 1 + step, count, step)]  # layer 0 would hide the embedding
    axes.set_xticks(ticks, ["emb", *(str(i - 1) for i in ticks[1:])])
    axes.set_xlim(-0.7, count - 0.3)
    axes.set_ylim(0, 108 * max(1e-9, *(max(e.added, e.accumulated) for e in errors)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_xlabel("layer", color=_FAINT)
    _legend(axes, _layer_handles(errors))
    return _png(figure)


def kl_picture(quality: Quality) -> bytes:
    """A PNG: how many positions have which KL divergence, from 1e-7 up, with mean, median and 99th
    percentile.
    """
    figure, axes = _sheet("KL divergence of next-token distributions, position by position")
    edges = (HISTOGRAM_EDGES[0] / 10**0.25, *HISTOGRAM_EDGES, HISTOGRAM_EDGES[-1] * 10**0.25)
    filled = [i for i, count in enumerate(quality.histogram) if count]
    axes.bar(
        edges[:-1], quality.histogram, [b - a for a, b in pairwise(edges)], align="edge",
        color=_SLIDING, edgecolor=_PAPER, linewidth=0.8, zorder=2,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(edges[max(0, filled[0] - 2)], edges[min(len(edges) - 1, filled[-1] + 3)])
    axes.set_ylim(0, 1.08 * max(quality.histogram))
    axes.set_xlabel("KL(original ‖ result), nats", color=_FAINT)
    axes.set_ylabel("positions", color=_FAINT)
    handles = []
    for name, value, colour, style in (
        ("median", quality.kl_median, _FULL, "-"),
        ("mean", quality.kl_mean, _LINE, "-"),
        ("99th percentile", quality.kl_99, _INK, "--"),
    ):
        at = max(value, edges[0])
        handles.append(
            axes.axvline(
                at, color=colour, linestyle=style, linewidth=1.8, zorder=3, label=f"{name} {value:#.3g}"
            )
        )
    _legend(axes, handles)
    return _png(figure)


def _layer_handles(errors: tuple[LayerError, ...]) -> list[Any]:
    from matplotlib.lines import Line2D  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    kinds = {e.kind for e in errors}
    names = {
        "embedding": "added by embedding",
        "sliding": "sliding-window layer",
        "full": "full-attention layer",
    }
    return [
        Line2D([], [], color=_LINE, linewidth=2, marker="o", markersize=4.5, label="accumulated"),
        *(Patch(color=_COLOURS[kind], label=names[kind]) for kind in _COLOURS if kind in kinds),
    ]


def _sheet(title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # noqa: PLC0415  (a second to import, and only for a card)

    figure = Figure(figsize=(8, 3.6), dpi=160, facecolor=_PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    axes = figure.add_subplot()
    axes.set_facecolor(_PAPER)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=26)
    axes.grid(axis="y", color=_GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=8.5, length=0)
    axes.tick_params(which="minor", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    return figure, axes


def _legend(axes: "Axes", handles: list[Any]) -> None:
    axes.legend(  # between title and plot, where it hides nothing
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=4, frameon=False,
        fontsize=8.5, labelcolor=_INK, columnspacing=1.6, handlelength=1.4, borderaxespad=0.2,
    )  # fmt: skip


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    written = BytesIO()
    FigureCanvasAgg(figure).print_png(written, metadata={"Software": None})  # no version, no time
    return written.getvalue()

"""The rows of frontier.py as tables in Markdown and as a picture."""

from collections.abc import Sequence

from measured_rows import Row
from texts_by_kind import KINDS
from ways_of_quantizing import DWQ, DYNAMIC, GPTQ, RECIPES, rounding

from convert.card import pictures

PLAIN = rounding(4, 64)  # what the others are held against
_STYLES = {  # label, colour, whether the points of a family are one line
    "rounding": ("rounded, groups of 64", pictures._FAINT, True),
    "others": ("rounded, groups of 32 and 128", pictures._EMBEDDING, False),
    "recipe": ("mixed recipes, rounded", pictures._INK, False),
    "calibrated": ("calibrated", pictures._LINE, True),
    DYNAMIC: ("mlx-lm's dynamic_quant", pictures._SLIDING, False),
    GPTQ: ("mlx-lm's gptq", pictures._FULL, False),
    DWQ: ("mlx-lm's dwq", "#7a9e3f", False),
}
_MARKERS = {GPTQ: "^", DWQ: "s", "recipe": "D"}


def kl_by_kind(row: Row) -> dict[str, float]:
    return {kind: figures["kl"] for kind, figures in row["kinds"].items()}


def print_tables(rows: Sequence[Row]) -> None:
    """A table for each checkpoint: KL as share of plain rounding's by kind, their mean and worst."""
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        mine = [row for row in rows if row["checkpoint"] == checkpoint]
        plain = next((kl_by_kind(row) for row in mine if row["name"] == PLAIN), None)
        if plain is None:
            print(f"{checkpoint}: no row {PLAIN} to hold the others against\n")
            continue
        kinds = list(plain)
        print(f"| {checkpoint} | bits per weight | {' | '.join(kinds)} | mean | worst | same token | s |")
        print("|---" * (len(kinds) + 6) + "|")
        absolute = " | ".join(f"{plain[kind]:.4f}" for kind in kinds)
        mean = sum(plain.values()) / len(plain)
        print(f"| KL of {PLAIN} | | {absolute} | {mean:.4f} | {max(plain.values()):.4f} | | |")
        for row in sorted(mine, key=lambda row: (_family(row["name"]), row["bits_per_weight"])):
            print(_line(row, plain))
        print()


def _line(row: Row, plain: dict[str, float]) -> str:
    """Shares of the kinds that both rows have; the mean is that of shares."""
    found = kl_by_kind(row)
    shares = {kind: found[kind] / plain[kind] for kind in plain if kind in found}
    cells = " | ".join(f"{shares[kind]:.3f}" if kind in shares else "" for kind in plain)
    same = sum(figures["same_token"] for figures in row["kinds"].values()) / len(row["kinds"])
    mean, worst = sum(shares.values()) / len(shares), max(shares.values())
    ends = f"{mean:.3f} | {worst:.3f} | {100 * same:.1f} % | {row['seconds']:.0f}"
    return f"| {row['name']} | {row['bits_per_weight']:.3f} | {cells} | {ends} |"


def _family(name: str) -> str:
    if name in RECIPES:
        return "recipe"
    family = name.partition("-")[0]
    return "others" if family == "rounding" and not name.endswith("-64") else family


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: mean KL over kinds against bits per weight, a panel for each checkpoint."""
    from matplotlib.figure import Figure

    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    size = (8, 4.4 * len(checkpoints))
    figure = Figure(figsize=size, dpi=160, facecolor=pictures._PAPER, layout="constrained")
    for place, checkpoint in enumerate(checkpoints, start=1):
        axes = figure.add_subplot(len(checkpoints), 1, place)
        axes.set_facecolor(pictures._PAPER)
        axes.grid(color=pictures._GRID, zorder=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.tick_params(which="both", colors=pictures._FAINT, labelsize=8.5, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(pictures._FAINT)
        title = f"{checkpoint}: mean over {len(KINDS)} kinds of text"
        axes.set_title(title, loc="left", color=pictures._INK, fontsize=11, fontweight="bold", pad=36)
        axes.set_xlabel("bits per weight", color=pictures._FAINT)
        axes.set_ylabel("KL(original ‖ result), nats", color=pictures._FAINT)
        handles = []
        for family, (label, colour, line) in _STYLES.items():
            points = sorted(
                (row["bits_per_weight"], sum(kl_by_kind(row)[kind] for kind in KINDS) / len(KINDS))
                for row in rows
                if row["checkpoint"] == checkpoint
                and _family(row["name"]) == family
                and "without" not in row["name"]
            )
            if points:
                handles += axes.plot(
                    *zip(*points, strict=True), color=colour, label=label, linewidth=2 if line else 0,
                    marker=_MARKERS.get(family, "o"), markersize=4.5, zorder=3,
                )  # fmt: skip
        pictures._legend(axes, handles)
    return pictures._png(figure)

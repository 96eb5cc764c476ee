"""The few shapes that the pictures of docs/ are made of, as SVG. All lengths are in pixels of the picture."""

from html import escape

SANS = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def number(value: float) -> str:
    """A length with one digit after the point at most, so that every machine writes the same."""
    return f"{value:.1f}".removesuffix(".0")


def document(width: int, height: int, title: str, style: str, shapes: list[str]) -> str:
    """A picture on paper of its own, so that it can be read on light and on dark pages."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
        *shapes,
        "</svg>",
        "",
    ])  # fmt: skip


def rect(x: float, y: float, width: float, height: float, kind: str, *, radius: float = 0) -> str:
    """A rectangle with its top left corner at x, y."""
    rounded = f' rx="{number(radius)}"' if radius else ""
    size = f'width="{number(width)}" height="{number(height)}"'
    return f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" {size}{rounded}/>'


def text(x: float, y: float, said: str, kind: str = "", *, anchor: str = "middle") -> str:
    """A line of text on the baseline y; `anchor` says what of it lies at x: start, middle or end."""
    kinds = f' class="{kind}"' if kind else ""
    place = f'x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"'
    return f"<text{kinds} {place}>{escape(said, quote=False)}</text>"


def path(points: list[tuple[float, float]], kind: str, *, closed: bool = False, arrow: bool = False) -> str:
    """Straight lines from point to point."""
    steps = " L".join(f"{number(x)} {number(y)}" for x, y in points)
    head = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<path class="{kind}" d="M{steps}{" Z" if closed else ""}"{head}/>'


def circle(x: float, y: float, radius: float, kind: str) -> str:
    """A circle around x, y."""
    return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'

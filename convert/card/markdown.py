"""Pieces of Markdown that the cards are written with."""

import re
from collections.abc import Sequence

from convert.texts.sequences import TextRead


def code(text: str) -> str:
    """Text as a code span that keeps to its table cell: line ends and other control characters are escaped,
    bars too, and fences are longer than the backticks inside.
    """
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text).replace("|", "\\|")
    if not text:
        return "*nothing*"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    # Markdown takes a space off both ends where both have one, unless there is nothing else.
    pad = " " if "`" in (text[0], text[-1]) or (text[0] == text[-1] == " " and text.strip()) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The lines of a table; the second row is the line under the titles."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def named(kind: str) -> str:
    """A kind of text: a word as it stands, a file's name as code."""
    return kind if kind.isalpha() else code(kind)


def texts_table(texts: Sequence[TextRead]) -> str:
    """Which texts were read, and how much of each."""
    rows: list[tuple[str, ...]] = [("text", "what it is", "tokens", "SHA-256"), ("---", "---", "---:", "---")]
    for text in texts:
        label = text.label
        about = label.about or f"the file {code(label.name)}"
        rows.append((named(label.kind), about, f"{text.tokens:,}", f"`{label.sha256[:16]}…`"))
    return table(rows)

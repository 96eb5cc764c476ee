"""Draw ways.svg: a prompt's way through the files, and where a cache's options are named, before and after.

    python docs/ways.py [--before FILE] [--after FILE] [--svg FILE]

Reads what tests/benchmarks/way_of_a_prompt.py wrote with --json, by default ways/before.json and
ways/after.json beside this file.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from svg import MONO, SANS, document, rect, text

HERE = Path(__file__).parent
FLAT = "olmo3_mlx/"  # the room of files in no sub-package

# All in pixels.
PANEL, GAP, MARGIN = 540, 20, 20
NAME, TICKS, ROW, HEAD, APART = 18, 146, 17, 24, 8  # within a panel: where names and ticks begin; heights
COLUMNS = (PANEL - 112, PANEL - 72, PANEL - 18)  # right ends of visits, kv_*, CacheOptions
ABOVE = 186  # of the rooms: titles and figures
BELOW = 44  # the panels: what the figures mean
KINDS = ("tick", "options", "value")  # the columns' colours
NOTES = (
    "The way: calls, from the command line to the first text of `olmo3 generate Hello`. A visit is calls of "
    "one file with none of another's between them; rounds of a loop count once.",
    "Counts on the right: visits; lines that name kv_bits, kv_group_size or kv_start; lines that name "
    "CacheOptions, the one value for them. Pale files are not on the way.",
)

STYLE = f"""
text {{ font: 12px {SANS}; fill: #2b2f36; }}
.title {{ font: 700 20px {SANS}; }} .said, .soft {{ fill: #5f6773; }} .column {{ font-size: 11px; }}
.file {{ font: 11.5px {MONO}; }} .room-name, .count {{ font: 600 11.5px {MONO}; }}
.figure {{ font: 600 13px {MONO}; }} .total {{ font: 11.5px {MONO}; fill: #5f6773; }}
.paper {{ fill: #fcfbf8; stroke: #dcd9d0; }} .panel {{ fill: #f4f2ec; stroke: #e2dfd7; }}
.room {{ fill: #fff; stroke: #e2dfd7; }} .track {{ fill: #eceef1; }} .tick {{ fill: #14958a; }}
.tick-text {{ fill: #0f766e; }} .options-text {{ fill: #c2410c; }} .value-text {{ fill: #6d4fb5; }}
.pale {{ fill: #8a92a0; }}
"""


class Row(NamedTuple):
    """A file: its name in its room, where on the way it is visited, and its lines that name a cache's
    options: one by one, and as the one value.
    """

    name: str
    visits: list[int]
    options: int
    value: int


def rooms(found: dict[str, Any]) -> dict[str, list[Row]]:
    """The files that are on the way or name a cache's options, by room; both in the order of the way."""
    sequence = found["way"]["sequence"]
    options, value = (found["options"][key]["by_file"] for key in ("any", "CacheOptions"))
    files = list(dict.fromkeys([*sequence, *options, *value]))
    found_rooms: dict[str, list[Row]] = {}
    for file in files:
        room, _, name = file.rpartition("/")
        visits = [place for place, visited in enumerate(sequence) if visited == file]
        row = Row(name, visits, options.get(file, 0), value.get(file, 0))
        found_rooms.setdefault(f"{room}/" if room else FLAT, []).append(row)
    return found_rooms


def height_of(found: dict[str, Any]) -> int:
    """Of a panel."""
    return ABOVE + sum(HEAD + ROW * len(rows) + 6 + APART for rows in rooms(found).values()) + 6


def figures(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a panel says at its top: a figure, and what it is of."""
    way, named = found["way"], found["options"]
    opened = Counter[str]()
    for key, times in found["opened"].items():
        opened[key.partition(" by ")[0]] += times
    yield f"{way['steps']}", f"steps between {way['files']} files, of {found['modules']}"
    yield (
        f"{opened['config.json']} ×",
        f"config.json read; generation_config.json {opened['generation_config.json']} ×",
    )
    yield f"{opened['model.safetensors']} ×", "the weights' file opened, and its header read"
    bits, group, start = (named[name]["signatures"] for name in ("kv_bits", "kv_group_size", "kv_start"))
    spread = count(named["any"]["files"], "file")
    yield (
        f"{named['any']['lines']}",
        f"lines of {spread} name kv_*; in {bits}, {group} and {start} signatures",
    )
    value = named["CacheOptions"]
    spread, taken = count(value["files"], "file"), count(value["signatures"], "signature")
    yield f"{value['lines']}", f"lines of {spread} name CacheOptions; in {taken}"


def count(number: int, thing: str) -> str:
    """As "1 file", "2 files"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def panel(x: int, title: str, found: dict[str, Any], height: int, longest: int) -> Iterator[str]:
    """One side; `longest` is the number of visits that fill the width."""
    yield rect(x, MARGIN, PANEL, height, "panel", radius=10)
    yield text(x + NAME, MARGIN + 32, title, "title", anchor="start")
    for number, (figure, said) in enumerate(figures(found)):
        y = MARGIN + 56 + 19 * number
        kind = ("tick", "tick", "tick", "options", "value")[number]
        yield text(x + NAME + 42, y, figure, f"figure {kind}-text", anchor="end")
        yield text(x + NAME + 52, y, said, "said", anchor="start")
    y = MARGIN + ABOVE - 10
    heads = (("visits",), ("kv_*",), ("Cache", "Options"))
    for right, parts, kind in zip(COLUMNS, heads, KINDS, strict=True):
        for above, part in enumerate(reversed(parts)):
            yield text(x + right, y - 13 * above, part, f"column {kind}-text", anchor="end")
    yield text(x + TICKS, y, "the way, from left to right", "column soft", anchor="start")
    y = MARGIN + ABOVE
    for room, rows in rooms(found).items():
        tall = HEAD + ROW * len(rows) + 6
        yield rect(x + 8, y, PANEL - 16, tall, "room", radius=6)
        yield text(x + NAME, y + 17, room, "room-name", anchor="start")
        totals = [sum(column) for column in zip(*map(counts, rows), strict=True)]
        for right, total in zip(COLUMNS, totals, strict=True):
            if total:
                yield text(x + right, y + 17, f"{total}", "total", anchor="end")
        for number, row in enumerate(rows):
            yield from line(x, y + HEAD + ROW * number, row, longest)
        y += tall + APART


def line(x: int, y: int, row: Row, longest: int) -> Iterator[str]:
    """A file."""
    width = COLUMNS[0] - 30 - TICKS
    step = width / longest
    yield text(
        x + NAME, y + 12, row.name.removesuffix(".py"), "file" if row.visits else "file pale", anchor="start"
    )
    yield rect(x + TICKS, y + 2, width, ROW - 4, "track", radius=3)
    for place in row.visits:
        yield rect(x + TICKS + step * place, y + 3, max(1.2, step * 0.8), ROW - 6, "tick")
    for right, number, kind in zip(COLUMNS, counts(row), KINDS, strict=True):
        if number:
            yield text(x + right, y + 12, f"{number}", f"count {kind}-text", anchor="end")


def counts(row: Row) -> tuple[int, int, int]:
    """What stands in the columns."""
    return len(row.visits), row.options, row.value


def draw(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The picture."""
    height = max(height_of(before), height_of(after))
    longest = max(len(found["way"]["sequence"]) for found in (before, after))
    wide, tall = 2 * (PANEL + MARGIN) + GAP, height + MARGIN + BELOW + 10
    title = "The way of a prompt through the files, and where a cache's options are named, before and after"
    shapes = [rect(0.5, 0.5, wide - 1, tall - 1, "paper", radius=12)]
    shapes += panel(MARGIN, "Before", before, height, longest)
    shapes += panel(MARGIN + PANEL + GAP, "After", after, height, longest)
    shapes += [
        text(MARGIN + NAME, height + MARGIN + 22 + 17 * place, note, "said", anchor="start")
        for place, note in enumerate(NOTES)
    ]
    return document(wide, tall, title, STYLE, shapes)


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side in ("before", "after"):
        parser.add_argument(f"--{side}", type=Path, default=HERE / "ways" / f"{side}.json", metavar="FILE")
    parser.add_argument("--svg", type=Path, default=HERE / "ways.svg", metavar="FILE")
    args = parser.parse_args()
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (args.before, args.after))
    args.svg.write_text(draw(before, after), encoding="utf-8")


if __name__ == "__main__":
    main()

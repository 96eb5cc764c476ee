"""The record of what a conversion has done so far, so that one that was killed can go on.

One file, a line of JSON each, an object whose keys say what it records: first the conversion's ingredients,
whose layers are null until their bits are chosen; the text that the checkpoint wrote itself, where it is
calibrated on that; what rounding each layer costs, where bits are chosen by that; then every weight that was
written with its tensors' checksums. A line that was cut short by a kill, or that records nothing known, ends
what can be trusted: what lies behind it is done again.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import ConvertError, Setting

NAME = "journal.jsonl"

# Keys of the ingredients. Settings are only told: others may mean the same.
SETTINGS, PROGRAM, DEVICE, SOURCE = "options", "program", "device", "source"
DTYPE, CALIBRATION, TARGET, LAYERS, COPIED_FILES = "dtype", "calibration", "target", "layers", "words"

Ingredients = Mapping[str, Any]  # all that the bytes of a result depend on, in JSON's types
Sums = Mapping[str, str]  # tensor -> SHA-256 of its bytes
Parts = tuple[str | Setting, ...]  # of an error's message

# Why ingredients can differ, whatever the settings; and why they can where all that is the same.
_AROUND: Mapping[str, Parts] = {
    PROGRAM: ("another version of olmo3-mlx or mlx",),
    DEVICE: ("on another device",),
    SOURCE: ("SOURCE is another or has changed",),
}
_BEHIND: Mapping[str, Parts] = {
    COPIED_FILES: ("the tokenizer's files have changed",),
    CALIBRATION: ("the text of ", Setting("calibrate"), " has changed"),
    LAYERS: ("the recipe has changed",),
}


class SelfWritten(NamedTuple):
    """Text that a checkpoint wrote itself: rows of token ids, and the bits that it was rounded to meanwhile;
    None if it was not.
    """

    ids: list[list[int]]
    bits: int | None


class Journal:
    """The record in a folder. Weights are known by their names in the source, layers by their paths.

    ingredients  as they were begun with; their layers are None until their bits are chosen
    written      the text that the checkpoint wrote itself, if it did
    costs        what rounding each layer costs, if that was measured
    done         the weights that are written
    """

    def __init__(self, folder: Path, ingredients: Ingredients) -> None:
        """Begin a journal, or go on with the one that is there.

        Raises ConvertError if that is of another conversion, naming what differs; OSError if it cannot
        be written.
        """
        self._path = folder / NAME
        self.written: SelfWritten | None = None
        self.costs: Mapping[str, float] | None = None
        self.done: dict[str, Sums] = {}
        self.ingredients: Ingredients = json.loads(json.dumps(ingredients))
        lines = _lines(self._path)
        if not lines or _is_record(lines[0]):
            self._write([self.ingredients])
            return
        earlier, *records = lines
        check_same(folder, earlier, self.ingredients)
        if earlier[LAYERS] is not None or self.ingredients[LAYERS] is None:
            self.ingredients = earlier
        records = list(takewhile(_is_record, records))
        self.done = {record["weight"]: record["sums"] for record in records if _is_written(record)}
        written = next((record["self"] for record in records if _is_self_written(record)), None)
        self.written = None if written is None else SelfWritten(written["ids"], written["bits"])
        self.costs = next((record["costs"] for record in records if _is_costs(record)), None)
        # Anew, without a line that was cut short and would swallow the next.
        self._write([self.ingredients, *records])

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace_file(self._path, lambda new: new.write_text(text, encoding="utf-8"))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def record_written(self, written: SelfWritten) -> None:
        """Record the text that the checkpoint wrote itself."""
        self.written = written
        self._append({"self": written._asdict()})

    def record_costs(self, costs: Mapping[str, float]) -> None:
        """Record what rounding each layer costs, by its path."""
        self.costs = costs
        self._append({"costs": costs})

    def record(self, weight: str, sums: Sums) -> None:
        """Record that the tensors of a weight are written."""
        self.done[weight] = sums
        self._append({"weight": weight, "sums": sums})

    def keep(self, tensors: Mapping[str, Collection[str]]) -> None:
        """Forget records that are not of a weight in `tensors` and all that it becomes, as listed there."""
        for weight, sums in list(self.done.items()):
            if weight not in tensors or sums.keys() != set(tensors[weight]):
                self.forget(weight)

    def forget(self, weight: str) -> None:
        """Forget a weight's record, so that it is written again."""
        del self.done[weight]


def begun(folder: Path) -> dict[str, Any]:
    """The ingredients of the conversion that was begun in a folder; empty if none was."""
    first = next(iter(_lines(folder / NAME)), {})
    return {} if _is_record(first) else first


def check_same(folder: Path, earlier: Ingredients, now: Ingredients) -> None:
    """Raise ConvertError, saying what differs, if what was begun in `folder` has other ingredients. Layers
    whose bits are not chosen yet differ from none.
    """
    differing = {key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key)}
    if any(LAYERS in each and each[LAYERS] is None for each in (earlier, now)):
        differing.discard(LAYERS)
    if differing <= {SETTINGS}:
        return
    reasons = [reason for key, reason in _AROUND.items() if key in differing]
    settings = earlier.get(SETTINGS)
    if SETTINGS in differing and (isinstance(settings, Mapping) or not reasons):
        asked = _told(now.get(SETTINGS), "none")
        reasons.append(("it was begun with ", *_told(settings, "no options"), ", not ", *asked))
    elif not reasons:
        reasons = [reason for key, reason in _BEHIND.items() if key in differing]
    raise ConvertError(
        f"the unfinished conversion in {folder} is another one (",
        *_joined(reasons or [("damaged",)], "; "),
        "): finish it as it was begun, or remove that folder",
    )


def _told(settings: object, none: str) -> Parts:
    """Settings as an error tells them; an earlier version wrote them as a text."""
    if not isinstance(settings, Mapping):
        return (settings or none if isinstance(settings, str) else "other options",)
    return tuple(_joined([(Setting(name, value),) for name, value in settings.items()] or [(none,)], " and "))


def _joined(parts: Iterable[Parts], between: str) -> Iterator[str | Setting]:
    for place, some in enumerate(parts):
        yield from (between, *some) if place else some


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            data = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            break
        lines.append(data)
    return lines


def _is_record(line: Mapping[str, Any]) -> bool:
    """Whether it records work, and not what the conversion was begun with."""
    return _is_written(line) or _is_costs(line) or _is_self_written(line)


def _is_self_written(record: Mapping[str, Any]) -> bool:
    """Whether it is text that the checkpoint wrote, in the form that `record_written` gives it."""
    written = record.get("self")
    return (
        isinstance(written, dict)
        and written.keys() == {"ids", "bits"}
        and (written["bits"] is None or type(written["bits"]) is int)
        and isinstance(written["ids"], list)
        and all(isinstance(row, list) and all(type(i) is int for i in row) for row in written["ids"])
    )


def _is_costs(record: Mapping[str, Any]) -> bool:
    """Whether it says what rounding layers costs, in the form that `record_costs` gives it."""
    costs = record.get("costs")
    return isinstance(costs, dict) and all(isinstance(c, float) and isfinite(c) for c in costs.values())


def _is_written(record: Mapping[str, Any]) -> bool:
    """Whether it says that a weight was written, in the form that `record` gives it."""
    weight, sums = record.get("weight"), record.get("sums")
    return (
        isinstance(weight, str) and isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())
    )

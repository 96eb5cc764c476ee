"""What a conversion has done so far, so that one that was killed can go on.

One file, a line of JSON each, an object whose keys say what it records: first what is being made of what
and by which options, then every weight that was written with its tensors' checksums. A line that was cut
short by a kill, or that records nothing known, ends what can be trusted: what lies behind it is done again.
"""

import json
from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from olmo3_mlx.errors import ConvertError

NAME = "journal.jsonl"

OPTIONS = "options"  # how a user says an identity; only told, as other words may say the same

Identity = Mapping[str, Any]  # what is made of what, in JSON's types
Sums = Mapping[str, str]  # tensor -> SHA-256 of its bytes

# Why an identity can differ, whatever the options; and why it can where all that is the same.
_AROUND = {
    "program": "another version of olmo3-mlx or mlx",
    "device": "on another device",
    "source": "SOURCE is another or has changed",
}
_BEHIND = {
    "words": "the tokenizer's files have changed",
    "calibration": "the text of --calibrate has changed",
    "layers": "the recipe has changed",
}


class Journal:
    """The record in a folder. Weights are known by their names in the source."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Begin one, or go on with that which is there.

        Raises ConvertError if that is of another conversion, naming what differs; OSError if it cannot
        be written.
        """
        self._path = folder / NAME
        self.done: dict[str, Sums] = {}
        identity = json.loads(json.dumps(identity))
        lines = _lines(self._path)
        if not lines or _is_written(lines[0]):
            self._path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
            return
        found, *records = lines
        check_same(folder, found, identity)
        records = list(takewhile(_is_written, records))
        self.done = {record["weight"]: record["sums"] for record in records}
        # Anew, without a line that was cut short and would swallow the next.
        self._path.write_text(
            "".join(json.dumps(line) + "\n" for line in [found, *records]), encoding="utf-8"
        )

    def record(self, weight: str, sums: Sums) -> None:
        """The tensors of a weight are written."""
        self.done[weight] = sums
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"weight": weight, "sums": sums}) + "\n")

    def keep(self, tensors: Mapping[str, Collection[str]]) -> None:
        """Forget records that are not of a weight in `tensors` and all that it becomes, as listed there."""
        for weight, sums in list(self.done.items()):
            if weight not in tensors or sums.keys() != set(tensors[weight]):
                self.forget(weight)

    def forget(self, weight: str) -> None:
        """It has to be written again."""
        del self.done[weight]


def identity(folder: Path) -> dict[str, Any]:
    """What is being made in a folder; empty if nothing was begun there."""
    found = next(iter(_lines(folder / NAME)), {})
    return {} if _is_written(found) else found


def check_same(folder: Path, found: Identity, now: Identity) -> None:
    """Raise ConvertError, saying what differs, if what was `found` in a folder is another conversion."""
    if all(found.get(key) == now.get(key) for key in (found.keys() | now.keys()) - {OPTIONS}):
        return
    differ = [reason for key, reason in _AROUND.items() if found.get(key) != now.get(key)]
    begun, asked = found.get(OPTIONS, "other options"), now.get(OPTIONS)
    if begun != asked:
        differ.append(f"it was begun with {begun or 'no options'}, not {asked or 'none'}")
    elif not differ:
        differ = [reason for key, reason in _BEHIND.items() if found.get(key) != now.get(key)]
    raise ConvertError(
        f"the unfinished conversion in {folder} is another one ({'; '.join(differ) or 'damaged'}): finish it "
        f"as it was begun, or remove that folder"
    )


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


def _is_written(record: Mapping[str, Any]) -> bool:
    """Whether it says that a weight was written, in the form that `record` gives it."""
    weight, sums = record.get("weight"), record.get("sums")
    return (
        isinstance(weight, str) and isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())
    )

"""Whether two checkouts do the same: every verb, run in many ways in both; what is said and what is written.

    python tests/benchmarks/same_output.py BEFORE AFTER [--only PATTERN ...] [--slow] [--jobs N] [--texts DIR]

BEFORE and AFTER are folders of this repository, each with an environment in .venv (else this Python runs
them). Each case's commands run in BEFORE and then in AFTER, in a folder of the same name; standard output,
standard error, exit code and all files that were written are compared: safetensors and other large or binary
files by their SHA-256. Times, tokens a second, peak memory and this program's version are blanked out
first; the largest ratio of peak memories is told at the end. A line for each case, and a diff for those that
differ; the exit code is 1 if any does that is not in INTENDED. Needs the test environment; cases that need
../shared are left out without it. `--slow` adds what calibrates, minutes each.
"""

import argparse
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from difflib import unified_diff
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import NamedTuple

from same_output_cases import cases
from same_output_cases.case import Case
from same_output_cases.materials import SHARED, make
from same_output_cases.playing import Checkout, Place, play


class Intended(NamedTuple):
    """A difference that is meant: in cases whose name matches, what `old` matches in BEFORE and `new` in
    AFTER (regular expressions) counts as the same.
    """

    cases: str
    old: str
    new: str
    reason: str


INTENDED = [  # by the rooms of 2026-11-27, against eceaf6d
    Intended("*", r"checkpoints: (?=\d)", r"snapshots: (?=\d)", "a checkpoint is a folder"),
    Intended("*", r"(?<=--raw`), raw=True in Python", r"(?<=--raw`)$", "options are spelled as flags"),
    Intended(
        "*", r"(?<=32, 64 or 128) and divide the head dimension 64(?=, not 48)", r"(?<=or 128)(?=, not 48)",
        "48 is refused before any model is known",
    ),
    Intended(
        "*--kv-group-size 0", r"exit code: 0[\s\S]*", r"exit code: 2[\s\S]*not 0\s*",
        "a group size of 0 was taken for none at all",
    ),
    Intended("*", r"token id 6874 is", r"token id 489 is", "the lowest of the wrong ids is named"),
    Intended(
        "*", r"\(\[load_safetensors\].*\)", r"\((its header|lm_head).*\)", "our own reader reads headers"
    ),
    Intended(
        "*", r"wrong-type: model.norm.weight must be .*", r"wrong-type/.*model.norm.weight is I32, .*",
        "our own reader reads headers",
    ),
    Intended(
        "inspect wrong: a group without kv-bits", r"exit code: 0[\s\S]*", r"exit code: 2[\s\S]*",
        "a group size that heads cannot have was passed over",
    ),
    Intended(
        "*",
        r"error: (.*(\((no )?--|\(resume=|=False \(|bits=None\)|a recipe|begun with --|give kv_).*|"
        r"[a-z_]+ must be .*)",
        r"error: (?!could not write|.*--raw|.*has a beginning).*--[a-z].*",
        "options are spelled as flags, in one way",
    ),
    Intended(
        "*", r"token ids must lie in 0 to \d+, got \d+", r"token id \d+ is outside .* another model",
        "ids are checked in one place",
    ),
    Intended(
        "*", r"--text prose.txt --tokens 2048 --length 256", r"--tokens 2048 --length 256 --text prose.txt",
        "the command is put together in one place",
    ),
    Intended(
        "*", r'"options": "--bits=4 --group-size=32"', r'"options": \{"bits": 4, "group_size": 32\}',
        "the journal keeps options as data",
    ),
    Intended(
        "*", r"^CheckpointError (?=no/such)", r"^UnknownNameError (?=no/such)", "a CheckpointError still",
    ),
]  # fmt: skip


SAME, MEANT, DIFFERS, LEFT_OUT = "same", "intended", "DIFFERS", "left out"


class Outcome(NamedTuple):
    """How a case ended: one of the four above, why or the diff, peak memory of AFTER over BEFORE's, what both
    took, and which of INTENDED there were.
    """

    case: Case
    result: str
    said: str = ""
    ratio: float = 0.0
    seconds: float = 0.0
    meant: tuple[int, ...] = ()


def compare(case: Case, sides: tuple[Checkout, Checkout], place: Place, texts: Path | None) -> Outcome:
    """Run a case in both checkouts, one after the other, and keep in `texts` what came of it."""
    if case.needs == "lab" and not SHARED.is_dir():
        return Outcome(case, LEFT_OUT, "needs ../shared")
    begin = time.monotonic()
    before, after = (play(case, side, sides[0], place) for side in sides)
    if texts is not None:
        name = f"{place.room.name} {re.sub('[^a-z0-9]+', '-', case.name.lower())[:60]}"
        for side, played in (("before", before), ("after", after)):
            (texts / f"{name}.{side}.txt").write_text(played.text, encoding="utf-8")
    both = zip(before.peaks, after.peaks, strict=False)
    seconds = time.monotonic() - begin
    ratio = max((new / old for old, new in both), default=0.0)
    if before.text == after.text:
        return Outcome(case, SAME, "", ratio, seconds)
    old, new, meant = settled(case.name, before.text, after.text)
    if old == new:
        reasons = dict.fromkeys(INTENDED[number].reason for number in meant)
        return Outcome(case, MEANT, "; ".join(reasons), ratio, seconds, meant)
    lines = unified_diff(old.splitlines(), new.splitlines(), "before", "after", lineterm="", n=2)
    return Outcome(case, DIFFERS, "\n".join(line[:400] for line in lines), ratio, seconds, meant)


def settled(name: str, old: str, new: str) -> tuple[str, str, tuple[int, ...]]:
    """Both texts with what is intended told alike, and which of INTENDED that was."""
    found = []
    for number, meant in enumerate(INTENDED):
        if fnmatch(name, meant.cases):
            told = f"<intended difference {number + 1}>"
            old, there = re.subn(meant.old, lambda _: told, old, flags=re.MULTILINE)  # noqa: B023
            new, too = re.subn(meant.new, lambda _: told, new, flags=re.MULTILINE)  # noqa: B023
            found += [number] if there or too else []
    return old, new, tuple(found)


def outcomes(
    chosen: list[Case], sides: tuple[Checkout, Checkout], scratch: Path, args: argparse.Namespace
) -> list[Outcome]:
    """Run the cases, some at a time, and print a line for each in their order."""
    home, materials, number = scratch / "home", scratch / "materials", count(1)
    home.mkdir()
    make(materials)
    found = []
    with ThreadPoolExecutor(args.jobs) as pool:
        places = [Place(scratch / "rooms" / f"{next(number):03}", materials, home) for _ in chosen]
        for outcome in pool.map(lambda case, place: compare(case, sides, place, args.texts), chosen, places):
            found.append(outcome)
            why = f"  ({outcome.said})" if outcome.said and outcome.result != DIFFERS else ""
            print(f"{outcome.result:<9}{outcome.seconds:6.1f} s  {outcome.case.name}{why}", flush=True)
            if outcome.result == DIFFERS:
                print(outcome.said, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of cases' names")
    parser.add_argument("--slow", action="store_true", help="also what calibrates")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (default: 2)")
    parser.add_argument(
        "--texts", type=Path, metavar="DIR", help="keep what came of each case in this folder"
    )
    args = parser.parse_args()
    if args.texts is not None:
        args.texts.mkdir(parents=True, exist_ok=True)
    sides = Checkout.at(args.before), Checkout.at(args.after)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs this in the background ignores it
    begin = time.monotonic()
    chosen = [
        case
        for case in cases()
        if (args.slow or not case.slow) and any(fnmatch(case.name, pattern) for pattern in args.only)
    ]
    with tempfile.TemporaryDirectory(prefix="same-output-") as scratch:
        found = outcomes(chosen, sides, Path(scratch).resolve(), args)
    results = [outcome.result for outcome in found]
    told = ", ".join(f"{results.count(r)} {r}" for r in (SAME, MEANT, DIFFERS, LEFT_OUT) if r in results)
    print(f"\n{len(found)} cases: {told}; {time.monotonic() - begin:.0f} s")
    most = max(found, key=lambda outcome: outcome.ratio, default=None)
    if most is not None and most.ratio:
        print(f"largest peak memory of AFTER over BEFORE's: {most.ratio:.3f} ({most.case.name})")
    seen = {number for outcome in found for number in outcome.meant}
    unseen = [meant for number, meant in enumerate(INTENDED) if number not in seen]
    if unseen and args.only == ["*"]:
        print("intended, but not found:", *(f"{meant.old} ({meant.reason})" for meant in unseen), sep="\n  ")
    return 1 if DIFFERS in results else 0


if __name__ == "__main__":
    sys.exit(main())

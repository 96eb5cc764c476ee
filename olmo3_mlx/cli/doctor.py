"""olmo3 doctor: whether this machine computes what it should."""

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmo3_mlx.doctor import Finding

_WIDTH = 27  # of the names' column


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "doctor",
        help="check that this machine computes what it should",
        description="Check this machine: versions and what is known to be wrong with them, memory, MLX's "
        "kernels against their definitions, the embedded demo against what it says elsewhere, caches that "
        "were rewound, quantized and saved, and a conversion. The exit code is 1 if a check failed; a line "
        "says what to do.",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="look at this checkpoint too, a folder or a hub id: whether it fits, is whole, and agrees with "
        "itself (the variable OLMO3_MODEL is not asked)",
    )
    parser.add_argument("--revision", metavar="R", help="a hub id's branch, tag or commit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, for a report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show each finding as it comes; returns the exit code."""
    from olmo3_mlx.doctor import examine  # noqa: PLC0415  (what it imports would delay every other verb)

    begun = time.perf_counter()
    findings = []
    for finding in examine(args.model, revision=args.revision, convert=_convert):
        findings.append(finding)
        if not args.json:
            print(_line(finding), flush=True)
    seconds = time.perf_counter() - begun
    counts = Counter(finding.status for finding in findings)
    if args.json:
        shown = [{**asdict(finding), "seconds": round(finding.seconds, 3)} for finding in findings]
        facts = {"ok": not counts["failed"], "seconds": round(seconds, 3), "findings": shown}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        total = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped"))
        print(f"{total}, in {seconds:.1f} s")
    return 1 if counts["failed"] else 0


def _convert(source: Path, dest: Path) -> None:
    from convert import convert  # noqa: PLC0415  (the library does not know it)

    convert(source, dest, bits=8, card=False)


def _line(finding: "Finding") -> str:
    """One line, and one more with what to do."""
    status = "FAILED" if finding.status == "failed" else finding.status
    advice = f"\n{'':8}what to do: {finding.advice}" if finding.advice else ""
    return f"{status:<8}{finding.name:<{_WIDTH}} {finding.detail}{advice}"

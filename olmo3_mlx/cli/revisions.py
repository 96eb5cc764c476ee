"""olmo3 revisions: a model's checkpoints on the hub, in the order of training."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from olmo3_mlx.checkpoints.revisions import Revision, list_revisions
from olmo3_mlx.cli.columns import in_columns

_COLUMNS: dict[str, Callable[[Revision], str]] = {
    "stage": lambda r: _number(r.stage),
    "ingredient": lambda r: _number(r.ingredient),
    "step": lambda r: _number(r.step),
    "tokens": lambda r: _tokens(r.tokens),
}


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "revisions",
        help="list a model's checkpoints on the hub",
        description="List the branches and tags of a model on the hub in the order of training, with the "
        "stage, step and tokens that their names tell. Any of them is a --revision of the other verbs.",
    )
    parser.add_argument("hub_id", metavar="HUB_ID", help="a model on the hub, allenai/Olmo-3-1025-7B say")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print them; returns the exit code."""
    revisions = list_revisions(args.hub_id)
    if args.json:
        found = {"model": args.hub_id, "revisions": [asdict(revision) for revision in revisions]}
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join(_table(revisions)))
    return 0


def _table(revisions: list[Revision]) -> list[str]:
    """A line each, with the columns that any of them has."""
    shown = {title: [cell(r) for r in revisions] for title, cell in _COLUMNS.items()}
    columns = [("revision", [r.name for r in revisions])]
    columns += [(title, cells) for title, cells in shown.items() if any(cells)]
    rows = [[title for title, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    return in_columns(rows, left=[0])


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _tokens(value: int | None) -> str:
    if value is None:
        return ""
    size, unit = next(
        (s, u) for s, u in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (1, "")) if value >= s or s == 1
    )
    return f"{value / size:g}{unit}"

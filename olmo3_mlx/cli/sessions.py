"""olmo3 sessions: the conversations that `olmo3 chat --session` keeps."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from olmo3_mlx.cli.columns import in_columns
from olmo3_mlx.cli.nearest import did_you_mean
from olmo3_mlx.conversation.listing import ConversationSummary, list_conversations, remove_conversation
from olmo3_mlx.conversation.place import check_name, sessions_folder
from olmo3_mlx.errors import SessionError
from olmo3_mlx.memory.plan import in_gib

_TITLES = ("session", "messages", "last used", "tokens", "size", "model")
_LEFT = (0, 2, 5)  # columns of words, which begin where their title begins


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "sessions",
        help="list saved conversations, or remove some",
        description="List the conversations that `olmo3 chat --session NAME` keeps, the one used last first: "
        "how many messages were said, when, with which model, how many tokens need not be read again, and "
        "the size on disk.",
    )
    parser.add_argument(
        "--remove",
        action="append",
        metavar="NAME",
        help="remove this one, unless another process has it open; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List or remove; returns the exit code."""
    if args.remove is not None:
        removed = []
        for name in _checked(args.remove):
            remove_conversation(name)
            removed.append(name)
            if not args.json:
                print(f"removed {name}")
        if args.json:
            print(json.dumps({"removed": removed}))
        return 0
    found = list_conversations()
    if args.json:
        sessions = [{**asdict(each), "last_used": each.last_used.isoformat()} for each in found]
        facts = {"folder": str(sessions_folder()), "sessions": sessions}
        print(json.dumps(facts, ensure_ascii=False))
    elif found:
        print("\n".join(_table(found)))
    else:
        print(f"no conversations are saved in {sessions_folder()}", file=sys.stderr)
    return 0


def _checked(names: Sequence[str]) -> list[str]:
    """Each of the names once, all of which are conversations'. Raises OptionError or SessionError."""
    there = [each.name for each in list_conversations()]
    for name in names:
        check_name(name)
        if name not in there:
            raise SessionError(f"there is no session {name}{did_you_mean(name, there)}")
    return list(dict.fromkeys(names))


def _table(found: Sequence[ConversationSummary]) -> list[str]:
    rows = [_TITLES, *(_row(each) for each in found)]
    wrong = [f"{each.name}: {each.problem}" for each in found if each.problem is not None]
    return [*in_columns(rows, _LEFT), *wrong]


def _row(summary: ConversationSummary) -> tuple[str, ...]:
    return (
        summary.name,
        "damaged" if summary.messages is None else str(summary.messages),
        f"{summary.last_used.astimezone():%Y-%m-%d %H:%M}",
        "" if summary.tokens is None else f"{summary.tokens:,}",
        in_gib(summary.nbytes),
        summary.model or "",
    )

"""The saved conversations: what there is, what was said, and taking one away."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from olmo3_mlx.conversation.place import (
    BUSY,
    NAME,
    REMOVED,
    check_name,
    former_folder,
    ready_folder,
)
from olmo3_mlx.conversation.saved import SavedConversation
from olmo3_mlx.durable import is_still, lock
from olmo3_mlx.errors import SessionError


@dataclass(frozen=True)
class ConversationSummary:
    """A saved conversation at a glance.

    name       what `open_conversation` takes
    messages   how many were said, a system message included; None if they cannot be read
    last_used  when it was saved last
    model      the model that it was held with last, as it was called then; None if that was not said
    tokens     what its caches hold; None if they hold nothing, or cannot be read
    nbytes     what it takes on the disk
    problem    what is wrong with it, in one line; None if nothing is
    """

    name: str
    messages: int | None
    last_used: datetime
    model: str | None
    tokens: int | None
    nbytes: int
    problem: str | None = None


def list_conversations() -> list[ConversationSummary]:
    """All saved conversations, the one used last first. One that is damaged is there, with its problem.

    Raises SessionError if the folder of saved conversations cannot be read.
    """
    folder, left = ready_folder()
    former = former_folder()
    found = [_summary(path) for path in _folders(folder)]
    for name, reason in left.items():
        assert former is not None, "what was left was left there"
        found.append(_summary(former / name, f"it cannot be moved from {former} to {folder}: {reason}"))
    return sorted(found, key=lambda summary: summary.last_used, reverse=True)


def read_conversations() -> tuple[dict[Path, list[dict[str, Any]]], dict[Path, SessionError]]:
    """What was said in each saved conversation, by its folder, in the order of their names; and of those that
    cannot be read, what is wrong. One in which nothing was said is in neither.

    One that another process has open is read too, as it was saved last. Raises SessionError if the folder of
    saved conversations cannot be read.
    """
    folder, left = ready_folder()
    former = former_folder()
    stayed = [] if former is None else [former / name for name in left]
    said, problems = {}, {}
    for path in sorted([*_folders(folder), *stayed], key=lambda path: path.name):
        try:
            messages = SavedConversation(path).messages
        except SessionError as error:
            problems[path] = error
            continue
        if messages:
            said[path] = messages
    return said, problems


def remove_conversation(name: str) -> None:
    """Remove a saved conversation, what its caches held included. It goes as a whole or not at all.

    Raises OptionError for what is no name, SessionError if there is no such conversation, another process has
    it open, or it cannot be removed.
    """
    check_name(name)
    folder, left = ready_folder()
    former = former_folder()
    path = folder / name if name not in left or former is None else former / name
    if not path.is_dir():
        raise SessionError(f"there is no session {name} in {folder}")
    if path.is_symlink():
        raise SessionError(f"{path} is a link: remove it, and what it leads to, by hand")
    going = path.with_name(f"{REMOVED}{name[:60]}")  # a longer name may be more than the disk takes
    try:
        with (path / "lock").open("a") as lock_file:
            if not lock(lock_file) or not is_still(lock_file, path / "lock"):
                raise SessionError(f"the session {name} is not removed: {BUSY}")
            shutil.rmtree(going, ignore_errors=True)
            path.rename(going)  # from here on it is gone, whatever happens
    except OSError as error:
        raise SessionError(f"cannot remove {path}: {error.strerror}") from None
    shutil.rmtree(going, ignore_errors=True)
    if going.exists():
        raise SessionError(f"the session {name} is removed, but not all of its files: {going} is left")


def _folders(folder: Path) -> Iterator[Path]:
    """The conversations' folders. What a process that was killed had still to remove goes."""
    try:
        found = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise SessionError(f"cannot read {folder}: {error.strerror}") from None
    for path in found:
        if path.name.startswith(REMOVED):
            shutil.rmtree(path, ignore_errors=True)
        elif NAME.fullmatch(path.name) and path.is_dir():
            yield path


def _summary(folder: Path, problem: str | None = None) -> ConversationSummary:
    messages, model = None, None
    try:
        saved = SavedConversation(folder)
        messages, model = len(saved.messages), saved.model
    except SessionError as error:
        problem = problem or str(error)
    tokens, caches_problem = _tokens(folder / "caches" / "caches.json")
    return ConversationSummary(
        folder.name,
        messages,
        datetime.fromtimestamp(max(map(_modified, (folder / "conversation.json", folder))), UTC),
        model,
        tokens,
        sum(map(_size, folder.rglob("*"))),
        problem or caches_problem,
    )


def _tokens(index: Path) -> tuple[int | None, str | None]:
    """How many tokens the caches hold, if that is known; and what is wrong with them."""
    try:
        spans = json.loads(index.read_text(encoding="utf-8"))["blocks"]
        return sum(len(span["tokens"]) for span in spans) or None, None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None, f"{index} is damaged: what was said will be read again"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it has just gone
        return 0

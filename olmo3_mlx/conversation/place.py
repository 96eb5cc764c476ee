"""Where saved conversations lie, and how they come there from where they lay before."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from olmo3_mlx.durable import flush, is_still, lock
from olmo3_mlx.errors import OptionError, SessionError

NAME = re.compile(r"\w[\w.-]{0,99}")
BUSY = "another process has it open"
REMOVED = ".removed-"  # before the name of what goes
_COPYING, _MOVED = ".moving-", ".moved-"


def sessions_folder() -> Path:
    """Where they lie: the folder OLMO3_SESSIONS, or olmo3-mlx/sessions in the user's data folder, which
    XDG_DATA_HOME names, or the system (on a Mac it is Library/Application Support). It need not be there.
    """
    given, data = os.environ.get("OLMO3_SESSIONS"), os.environ.get("XDG_DATA_HOME")
    if given:
        try:
            return Path(given).expanduser()
        except RuntimeError:  # of a user that there is not
            return Path(given)
    return (Path(data) if data else _data_folder()) / "olmo3-mlx" / "sessions"


def ready_folder() -> tuple[Path, dict[str, str]]:
    """That folder, with the conversations from where they lay in earlier versions; and of those that could
    not be moved, by name, why.

    Raises SessionError if what should be a folder is a file.
    """
    folder, former = sessions_folder(), former_folder()
    for place in (folder, *folder.parents):
        if _is_no_folder(place):
            raise SessionError(
                f"{place} is a file: expected the folder of saved conversations (set OLMO3_SESSIONS to one)"
            )
    return folder, {} if former is None else move_conversations(former, folder)


def _is_no_folder(place: Path) -> bool:
    try:
        return place.exists() and not place.is_dir()
    except OSError:  # whoever opens it will be told why
        return False


def former_folder() -> Path | None:
    """Where they lay on this system before, if that was somewhere else."""
    former = Path.home() / ".local" / "share" / "olmo3-mlx" / "sessions"
    elsewhere = os.environ.get("OLMO3_SESSIONS") or os.environ.get("XDG_DATA_HOME")
    return None if elsewhere or former == sessions_folder() else former


def check_name(name: str) -> None:
    """Raise OptionError for what cannot be a conversation's name."""
    if not NAME.fullmatch(name):
        raise OptionError(
            f"a session's name must be at most 100 letters, digits, '_', '-' and '.', and begin with one of "
            f"the first three, not {name!r}"
        )


def nothing_said(folder: Path) -> bool:
    """Whether there is no more of a conversation than its lock. Raises OSError."""
    return {path.name for path in folder.iterdir()} == {"lock"}


def move_conversations(former: Path, folder: Path) -> dict[str, str]:
    """Move all conversations; those that could not be moved stay whole where they were, and are returned with
    the reason.

    A conversation is at one of both places, whole, at any moment. One whose name is taken gets another, with
    a number behind it.
    """
    left: dict[str, str] = {}
    try:
        found = sorted(former.iterdir())
    except OSError:  # none
        return left
    for path in found:
        if path.name.startswith((_MOVED, REMOVED)):  # a process was killed while it removed this
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and NAME.fullmatch(path.name):
            try:
                if not _moved(path, folder):
                    left[path.name] = BUSY
            except FileNotFoundError:  # another process has just moved it
                pass
            except OSError as error:
                left[path.name] = error.strerror or str(error)
    with suppress(OSError):
        former.rmdir()  # if it is empty
    return left


def _moved(path: Path, folder: Path) -> bool:
    """Move one conversation; False if another process has it open. Raises OSError, and it stays."""
    with (path / "lock").open("a") as lock_file:
        if not lock(lock_file):
            return False
        if not is_still(lock_file, path / "lock"):
            return True
        if nothing_said(path):
            _remove(path)
            return True
        folder.mkdir(parents=True, exist_ok=True)
        for place in _places(folder, path.name):
            if place.exists() and place.samefile(path):  # by a link, both places are one
                return True
            if _same(path, place):  # a process was killed after it had copied it
                _remove(path)
                return True
            if place.exists():
                continue
            try:
                path.rename(place)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue
                if error.errno != errno.EXDEV:
                    raise
                _copy(path, place)
                _remove(path)
            return True
    raise AssertionError("names do not end")


def _places(folder: Path, name: str) -> Iterator[Path]:
    yield folder / name
    yield from (folder / f"{name[:90]}-{number}" for number in count(2))


def _same(one: Path, other: Path) -> bool:
    """Whether both hold the same conversation."""
    try:
        return (one / "conversation.json").read_bytes() == (other / "conversation.json").read_bytes()
    except OSError:
        return False


def _copy(path: Path, place: Path) -> None:
    """Copy a conversation to another file system; it appears when it is whole and on the disk."""
    unfinished = place.with_name(f"{_COPYING}{path.name}")  # nobody else's, who would need the lock for it
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(path, unfinished)
        for each in (*unfinished.rglob("*"), unfinished):
            flush(each)
        unfinished.rename(place)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, shutil.Error):  # it has no reason of its own, and a list of those of files
            raise OSError(errno.EIO, str(error.args[0][0][2])) from None
        raise
    flush(place.parent)


def _remove(path: Path) -> None:
    """Remove a conversation's folder, whose name goes at once and what is in it afterwards."""
    going = path.with_name(f"{_MOVED}{path.name[:60]}")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _data_folder() -> Path:
    from platformdirs import user_data_path  # noqa: PLC0415  (here, as most commands save nothing)

    return user_data_path()

"""The texts that an option names: files, and among those to calibrate on two that are no files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmo3_mlx.errors import OptionError, Setting

Files = str | Path | Sequence[str | Path]  # one text file or several
ITSELF = "self"  # what the model writes itself
SAVED = "chats"  # the conversations that are saved on this machine
NO_FILES = (ITSELF, SAVED)  # a file of such a name is ./self, or a Path


def files_of(name: str, value: object, expected: str = "a text file or several") -> tuple[Path, ...] | None:
    """The files that an option's value names; None if it is None, True or False. Raises OptionError for what
    names none.
    """
    if value is None or isinstance(value, bool):
        return None
    files = given(value)
    if not (
        isinstance(files, list | tuple)
        and files
        and all(isinstance(f, str | Path) and f != "" for f in files)
    ):
        raise OptionError(Setting(name), f" must be {expected}, not {value!r}")
    return tuple(map(Path, files))


def given(value: Any) -> Sequence[str | Path]:
    """What an option of one file or several was given; nothing for None, True and False."""
    if value is None or isinstance(value, bool):
        return ()
    return [value] if isinstance(value, str | Path) else value

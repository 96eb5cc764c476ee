"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

import fcntl
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

_UNFINISHED = ".unfinished-"


def replace_file(
    path: Path, write: Callable[[Path], object], rename: Callable[[Path], Path] | None = None
) -> Path:
    """Let `write` fill a new file that then takes the place of `path`, or vanishes if it fails. With
    `rename` what that makes of the written file is its place, in the same folder. Returns the place.

    Raises what `write` raises, and OSError if the disk does not take it.
    """
    handle, name = tempfile.mkstemp(prefix=_UNFINISHED, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    new = Path(name)
    try:
        write(new)
        flush(new)
        path = rename(new) if rename is not None else path
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    flush(path.parent)
    return path


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed left half-written. Nobody else may write there now."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            path.unlink()


def lock(stream: IO[str]) -> bool:
    """Take a file for this process alone, until it is closed; False if another process has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_still(stream: IO[str], path: Path) -> bool:
    """Whether an open file is the one that lies at `path` now: what was locked may have been moved before."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False


def flush(path: Path) -> None:
    """Return when a file's content, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # on a Mac fsync stops at the drive's own memory
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

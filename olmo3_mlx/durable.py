"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new file that then takes the place of `path`, or vanishes if it fails.

    Raises what `write` raises, and OSError if the disk does not take it.
    """
    handle, name = tempfile.mkstemp(prefix=".unfinished-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    new = Path(name)
    try:
        write(new)
        flush(new)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Return when a file's content, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The folder that a conversion writes to, beside its destination, whose name it takes when complete."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.size import in_words
from convert.writer.journal import LAYERS, begun
from convert.writer.journal import NAME as JOURNAL
from convert.writer.layout import Layout
from olmo3_mlx.checkpoints.names import is_hub_id, resolve
from olmo3_mlx.durable import flush, is_still, lock, remove_unfinished
from olmo3_mlx.errors import ConvertError, HubError, Olmo3Error, Setting

_LOCK = "lock"


def unfinished(dest: Path) -> Path:
    """The folder that the work for `dest` lies in until it is complete."""
    return dest.with_name(f".{dest.name}.unfinished")


def destination(dest: str | Path) -> Path:
    """The path that a destination's name means. Raises ConvertError for a name that no folder can have."""
    try:
        path = Path(dest).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # ~nosuchuser, or a working directory that is gone
        raise ConvertError(f"{dest} is no place to write to ({error}): choose another destination") from None
    if path.name in ("", ".."):
        raise ConvertError(f"{dest} is no name for a new folder: choose another destination")
    return path


def check_apart(dest: Path, *names: str | Path) -> None:
    """Raise ConvertError if `dest`, an absolute path, is the folder of a checkpoint that is read, lies in it,
    or holds it, through symbolic links too. `names` are checkpoints'; hub ids are never in the way.
    """
    for name in names:
        if is_hub_id(name):
            continue
        folder = resolve(name)
        try:
            folder, place = folder.resolve(), dest.resolve()
        except (OSError, RuntimeError, ValueError):  # no place at all, which is said when it is made
            continue
        if any(_same(folder, one) for one in (place, *place.parents)):
            where = "is" if _same(folder, place) else "lies inside"
            raise ConvertError(f"{dest} {where} {name}, which is to be read: choose another destination")
        for work in (place, unfinished(place)):
            if any(_same(work, each) for each in (folder, *folder.parents)):
                raise ConvertError(
                    f"{name}, which is to be read, lies in {work}, which is to be written: choose another "
                    f"destination"
                )


def _same(one: Path, other: Path) -> bool:
    """Whether both are there and are one folder, however they are spelled."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def resumable(dest: str | Path) -> bool:
    """Whether there is an unfinished conversion to a destination to go on with. Raises ConvertError."""
    return bool(begun(unfinished(destination(dest))))


@contextmanager
def new_folder(dest: Path, *, resume: bool) -> Iterator[Path]:
    """A hidden folder beside `dest`, an absolute path, that becomes `dest` when the block ends.

    Interrupted, out of disk or killed, it stays, and with `resume` the next one goes on in it; after
    an error that going on would meet again it vanishes. What lies there without a journal is removed, as
    nothing tells what it is. Raises ConvertError if `dest` exists, if an unfinished folder is there and
    `resume` is not given, or if another process works in it.
    """
    folder = unfinished(dest)
    if os.path.lexists(dest):
        complete = " and is complete" if _remove_work(dest) and resume else ""
        raise ConvertError(f"{dest} exists already{complete}: choose another destination, or remove it")
    created: list[Path] = []
    try:
        created = [parent for parent in dest.parents if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = (folder / _LOCK).open("w")
    except (OSError, ValueError) as error:  # a null byte in a name is a ValueError
        _remove_empty([folder, *created])
        hint = " (the work is done in a folder with a longer name): choose a shorter one"
        hint = hint if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConvertError(f"cannot write to {dest.parent}: {reason}{hint}") from None
    with lock_file:
        # Another process may just have completed the folder, and given it its name.
        if not lock(lock_file) or not is_still(lock_file, folder / _LOCK):
            raise ConvertError(f"another process is converting to {dest}: let it finish")
        new = not begun(folder)
        if not new and not resume:
            raise ConvertError(
                f"an unfinished conversion to {dest} lies in {folder}: go on with ",
                Setting("resume", True),
                ", or remove that folder to begin anew",
            )
        remove_unfinished(folder)
        try:
            if new:
                _empty(folder)
            yield folder
            _complete(folder, dest)
        except BaseException as error:
            stays = (folder / JOURNAL).exists() and (
                isinstance(error, HubError) or not isinstance(error, Olmo3Error)
            )
            if new and not stays:
                _remove(folder, created)
            if isinstance(error, OSError):
                raise ConvertError(*_explained(error, dest, stays)) from None
            raise


def check_room(folder: Path, layout: Layout, extra: int = 0) -> None:
    """Raise ConvertError if the disk has no place for what is still to be written, and `extra` bytes."""
    written = sum(_allocated(folder / file) for file in layout.headers)
    needed, free = layout.nbytes - written + extra, shutil.disk_usage(folder).free
    if needed > free:
        raise ConvertError(
            f"the result needs {in_words(needed)}, the disk of {folder.parent} has {in_words(free)} left: "
            f"make room, or write elsewhere"
        )


def _allocated(file: Path) -> int:
    return file.stat().st_blocks * 512 if file.exists() else 0  # the files have holes where nothing is yet


def _complete(folder: Path, dest: Path) -> None:
    """Give the folder its name. What only the work needed goes afterwards: without the journal a folder
    that has not got its name yet would be worth nothing.
    """
    for path in folder.iterdir():
        flush(path)
    if os.path.lexists(dest):
        raise FileExistsError(errno.EEXIST, "it has appeared meanwhile")
    flush(folder)
    folder.chmod(0o777 & ~_umask())
    folder.rename(dest)
    with suppress(OSError):  # it is there, though perhaps not yet on the disk
        flush(dest.parent)
    _remove_work(dest)


def _remove_work(dest: Path) -> bool:
    """Remove what only the work needed from a destination that is complete; True if there was any, as a run
    leaves it that was killed right after the folder got its name.
    """
    try:
        if LAYERS not in begun(dest):  # somebody else's file, if any
            return False
        (dest / _LOCK).unlink(missing_ok=True)
        (dest / JOURNAL).unlink()
        flush(dest)
    except OSError:
        return False
    return True


def _empty(folder: Path) -> None:
    """Remove all but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _remove(folder: Path, created: list[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _remove_empty(created)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError, ValueError):
            folder.rmdir()


def _explained(error: OSError, dest: Path, stays: bool) -> tuple[str | Setting, ...]:
    """The message on an error of the disk, which says whether the work so far stays."""
    advice = {
        errno.ENOSPC: "make room, then ",
        errno.EDQUOT: "make room, then ",
        errno.EEXIST: "move it away, then ",
    }
    failed = f"could not write {dest}: {error.strerror or error}; "
    if not stays:
        return (f"{failed}nothing was kept",)
    resume = Setting("resume", True)
    return (f"{failed}{advice.get(error.errno or 0, '')}go on with ", resume, ", what was done is kept")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

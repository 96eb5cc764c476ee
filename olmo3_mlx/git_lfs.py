"""Git LFS pointers: the few lines that a clone has in place of a large file until that is fetched."""

from pathlib import Path

from olmo3_mlx.errors import Olmo3Error

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, error: type[Olmo3Error]) -> None:
    """Raise `error` if the file is a pointer. A file that cannot be read is none."""
    try:
        with path.open("rb") as file:
            found = file.read(len(_BEGINNING))
    except OSError:
        return
    if found == _BEGINNING:
        raise error(f"{path}: is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`")

"""The progress bar of long work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


_FORM = "{desc}{percentage:3.0f}%|{bar}| {elapsed}"


@contextmanager
def progress_bar(title: str) -> Iterator["tqdm[NoReturn]"]:
    """Show a bar on stderr, if that is a terminal, until the end; its remaining time is guessed from the mean
    speed so far, as some steps are done at once and others take minutes.
    """
    from tqdm import tqdm  # noqa: PLC0415  (slow to import)

    bar: tqdm[NoReturn]
    with tqdm(total=1, bar_format=_FORM, smoothing=0, file=sys.stderr, leave=False, disable=None) as bar:
        bar.set_description(title)
        yield bar


def show(bar: "tqdm[NoReturn]", done: int, total: int) -> None:
    """Move `bar` to where so much of `total` is done."""
    bar.total = total
    bar.bar_format = f"{_FORM}<{{remaining}}" if done > total / 20 else _FORM  # too early to tell before
    bar.update(done - bar.n)

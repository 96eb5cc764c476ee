"""The progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    from tqdm import tqdm


_FORM = "{desc}{percentage:3.0f}%|{bar}| {elapsed}"
_TICK = 1.0  # seconds between two looks at the clock
_LOGGED = 30.0  # seconds between two lines in a log, and before the first: what is quick says nothing


class ProgressBar(Protocol):
    """Shows stages of work one after another, each from its beginning to its end."""

    def stage(self, title: str) -> None:
        """A stage begins, or, behind a comma, another part of the one that it is at."""
        ...

    def progress(self, done: int, total: int) -> None:
        """So much of the stage is done."""
        ...

    def say(self, line: str) -> None:
        """Print a line beside it."""
        ...


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressBar]:
    """Show progress on stderr until the end, beginning with a stage `title`: a bar on a terminal, else lines,
    the first when the work has taken half a minute.
    """
    if not sys.stderr.isatty():
        yield _Log(title)
        return
    from tqdm import tqdm  # noqa: PLC0415  (slow to import)

    bar: tqdm[NoReturn]
    with (
        tqdm(desc=f"{title}: ", total=1, bar_format=_FORM, smoothing=0, file=sys.stderr, leave=False) as bar,
        _ticking(bar),
    ):
        yield _Bar(bar)


@contextmanager
def _ticking(bar: "tqdm[NoReturn]") -> Iterator[None]:
    """Let the bar's clock go on while a single step takes long."""
    ended = Event()

    def tick() -> None:
        while not ended.wait(_TICK):
            bar.refresh()

    thread = Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Bar:
    def __init__(self, bar: "tqdm[NoReturn]") -> None:
        self._bar, self._name, self._tells = bar, "", False

    def stage(self, title: str) -> None:
        name, before = title.partition(",")[0], self._name
        self._name = name
        self._tells = title.endswith(" left")  # "calibrating, layer 3 of 32, about 12 min left"
        self._bar.set_description(title, refresh=name == before)
        if name != before:
            self._bar.bar_format = _FORM
            self._bar.reset(total=1)

    def progress(self, done: int, total: int) -> None:
        bar = self._bar
        bar.total = max(total, 1)
        # The time that remains is guessed from the mean speed in this stage, unless the stage tells it; too
        # early to tell before.
        bar.bar_format = f"{_FORM}<{{remaining}}" if done > total / 20 and not self._tells else _FORM
        bar.update(done - bar.n)
        if done == total:
            bar.refresh()

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)


class _Log:
    def __init__(self, title: str) -> None:
        self._title, self._share, self._told = title, 0.0, False
        self._begun = self._last = time.monotonic()

    def stage(self, title: str) -> None:
        if title.partition(",")[0] != self._title.partition(",")[0]:
            self._begun, self._share, self._told = time.monotonic(), 0.0, False
        self._title = title
        self._tell()

    def progress(self, done: int, total: int) -> None:
        self._share = done / max(total, 1)
        self._tell()

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """Print where it is, if a line is due, and the end of a stage that had one."""
        now = time.monotonic()
        ended = self._told and self._share == 1
        if now - self._last >= _LOGGED or ended:
            minutes, seconds = divmod(int(now - self._begun), 60)
            self.say(f"{self._title}: {int(100 * self._share)}% after {minutes}:{seconds:02}")
            self._last, self._told = now, not ended and self._share < 1

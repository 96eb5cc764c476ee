"""Ctrl-C that stops an answer and not the program."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the yielded function return True; a second one raises
    KeyboardInterrupt. A flag, not an exception: that could strike halfway through a step.
    """
    pressed = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class PrefillProgress:
    """Shows a long prompt being read, on a terminal, and ends it when the user has pressed Ctrl-C."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int) -> None:
        """After each pass of a prefill; raises KeyboardInterrupt to end it."""
        if self._interrupted():
            raise KeyboardInterrupt
        if self._bar is None and done < total and sys.stderr.isatty():
            from tqdm import tqdm  # noqa: PLC0415  (here, as most prompts need no bar)

            self._bar = tqdm(total=total, desc="reading", unit="tok", leave=False, file=sys.stderr)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
                self._bar = None

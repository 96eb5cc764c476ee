"""Ctrl-C that stops an answer and not the program, and signals that end the program in order."""

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


_LONG = 512  # tokens of a prompt that takes a while to read


class Terminated(KeyboardInterrupt):
    """The program was told to end by the signal `signum`; it ends as after Ctrl-C, with the exit code that
    a shell gives for that signal.
    """

    def __init__(self, *parts: str, signum: int) -> None:
        super().__init__(*parts)
        self.signum = signum


def ended_by(stop: KeyboardInterrupt) -> tuple[str, int]:
    """The word for what ended the program, and its exit code."""
    if not isinstance(stop, Terminated):
        return "interrupted", 128 + signal.SIGINT
    return "terminated" if stop.signum == signal.SIGTERM else "hung up", 128 + stop.signum


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise Terminated, so that what is unfinished is left as Ctrl-C leaves it.

    One is enough: further ones, while that is done, do nothing. What whoever started the program has it
    ignore, as nohup does SIGHUP, stays ignored.
    """
    ended = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise Terminated(signum=signum)

    named = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows
    before = {signum: signal.getsignal(signum) for signum in named}
    before = {signum: handler for signum, handler in before.items() if handler is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class PrefillProgress:
    """Shows a long prompt being read, on a terminal, and ends it when the user has pressed Ctrl-C.

    The bar is there from the beginning and moves when a pass is done; within one nobody knows how far it is.
    """

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Before a prefill and after each pass; raises KeyboardInterrupt to end it."""
        if self._interrupted():
            raise KeyboardInterrupt
        if self._bar is None and done < total and total >= _LONG and sys.stderr.isatty():
            from tqdm import tqdm  # noqa: PLC0415  (here, as most prompts need no bar)

            self._bar = tqdm(total=total, desc="reading", unit="tok", leave=False, file=sys.stderr)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
                self._bar = None

"""Ctrl-C that stops an answer and not the program; and being told to end, which keeps what was said."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

_ENDING = (signal.SIGTERM, signal.SIGHUP)  # `kill` and a shutdown; a terminal that was closed


class Terminated(BaseException):
    """A signal told the process to end, and what was to be kept is kept."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signal = signal.Signals(signum)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the yielded function return True; a second one raises
    KeyboardInterrupt. A flag, not an exception: that could strike halfway through a step.

    SIGTERM and SIGHUP make it return True as well, however often they come, and raise Terminated when the end
    of it is reached. Signals that whoever started us had ignored, as `nohup` does, stay so.
    """
    received: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in received:
            raise KeyboardInterrupt
        received.append(signum)

    heard = [s for s in (signal.SIGINT, *_ENDING) if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    before = {each: signal.signal(each, handle) for each in heard}
    try:
        yield lambda: bool(received)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        ending = [each for each in received if each in _ENDING]
        if ending:
            raise Terminated(ending[0])


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

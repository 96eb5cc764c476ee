"""Ctrl-C that stops an answer and not the program; and being told to end, which keeps what was said."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

_LONG = 512  # tokens of a prompt that takes a while to read
_ENDING = (signal.SIGTERM, signal.SIGHUP)  # `kill` and a shutdown; a terminal that was closed


class Terminated(BaseException):
    """A signal told the process to end, and what was to be kept is kept. `said` is what else to say."""

    def __init__(self, signum: int, *said: str) -> None:
        super().__init__(*said)
        self.signal = signal.Signals(signum)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the yielded function return True; a second one raises
    KeyboardInterrupt. A flag, not an exception: that could strike halfway through a step.

    SIGTERM and SIGHUP make it return True as well, however often they come, and raise Terminated when the end
    of it is reached.
    """
    received: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in received:
            raise KeyboardInterrupt
        received.append(signum)

    try:
        with _handled_by(handle, (signal.SIGINT, *_ENDING)):
            yield lambda: bool(received)
    finally:
        ending = [each for each in received if each in _ENDING]
        if ending:
            raise Terminated(ending[0])


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise Terminated, so that what is unfinished is left as Ctrl-C leaves it.
    One is enough: further ones, while that is done, do nothing.
    """
    ended = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise Terminated(signum)

    with _handled_by(handle, _ENDING):
        yield


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None], signals: Iterable[int]) -> Iterator[None]:
    """Signals that whoever started us had ignored, as `nohup` does, stay so."""
    heard = [each for each in signals if signal.getsignal(each) not in (signal.SIG_IGN, None)]
    before = {each: signal.signal(each, handle) for each in heard}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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

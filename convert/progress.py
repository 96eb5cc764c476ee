"""How a long work tells its caller where it is: in which stage, and how far it is within that."""

from collections.abc import Callable

from olmo3_mlx.errors import Olmo3Error

Stage = Callable[[str], None]  # what begins now: a stage in words, and behind a comma what part of it
Progress = Callable[[int, int], None]  # how much of the stage is done, of how much in all
Notice = Callable[[Olmo3Error], None]  # what does not hinder the work, and will be missed


def untold(*_: object) -> None:
    """Nobody wants to know."""


class Count:
    """Counts up to a total within a stage, and tells so: from `done` on, never back, never beyond."""

    def __init__(self, total: int, progress: Progress | None, done: int = 0) -> None:
        self._done, self._total, self._progress = done, total, progress or untold
        self._progress(done, total)

    def __call__(self, more: int) -> None:
        """So much more is done."""
        if more and self._done < self._total:
            self._done = min(self._done + more, self._total)
            self._progress(self._done, self._total)

    def end(self) -> None:
        """All is done; what was not counted before is counted now."""
        self(self._total - self._done)

"""A check of this machine, and what it found."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from olmo3_mlx.errors import Olmo3Error

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

_NOT_COMPILED = (
    "MLX could not compile a kernel, which says nothing of its results: install the file that the message "
    "lacks (NVIDIA's crt/mma.h comes with `pip install nvidia-cuda-crt`), and look again"
)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    name     of the check
    status   "passed", "failed" or "skipped"
    detail   one line: the figure beside its tolerance, the facts, or why it was skipped
    advice   what to do, empty unless it failed
    seconds  that it took
    """

    name: str
    status: str
    detail: str
    advice: str = ""
    seconds: float = 0.0


class Outcome(NamedTuple):
    """What a check returns: a Finding knows the rest. `advice` goes before the check's own."""

    status: str
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """Something to look at. `advice` says what to do where `look` fails, or raises."""

    name: str
    look: Callable[[], Outcome]
    advice: str

    def finding(self) -> Finding:
        """Look. What is raised is a failure with the error's line; an interrupt goes through."""
        begun = time.perf_counter()
        try:
            outcome = self.look()
        except Olmo3Error as error:
            outcome = Outcome(FAILED, str(error))
        except Exception as error:  # whatever a broken machine does
            line = " ".join(f"{type(error).__name__}: {error}".split())
            outcome = Outcome(FAILED, line, _NOT_COMPILED if "compile kernel" in line else "")
        seconds = time.perf_counter() - begun
        advice = (outcome.advice or self.advice) if outcome.status == FAILED else ""
        return Finding(self.name, outcome.status, outcome.detail, advice, seconds)

    def skipped(self, why: str) -> Finding:
        """The finding of a check that could not be made."""
        return Finding(self.name, SKIPPED, why)


def judged(holds: bool, detail: str) -> Outcome:
    """Passed or failed, with the figures that say so."""
    return Outcome(PASSED if holds else FAILED, detail)

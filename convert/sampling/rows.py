"""Rows of text that is drawn a token at a time: in a row some tokens are forced, by the template, and others
are the model's.

All rows advance by one token a step, whatever stands in them, so that they have one length and no padding; a
conversation that ends is followed by the next in the same row.
"""

from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Protocol

from convert.sampling.script import Script

_USER, _ANSWER, _RESULT = "user", "answer", "result"
_LIMITS = {_USER: 96, _ANSWER: 256, _RESULT: 96}  # tokens of what one says, in a row of _OF
_OF = 512
_LEAST = 8  # of those in a short row


class Row(Protocol):
    """What one sequence goes on with."""

    def next(self, drawn: int) -> int:
        """The next token of the row; `drawn` is what the model would go on with."""
        ...


class Documents:
    """Text of a model that does not chat: whatever it goes on with behind its end token, which ends a text
    and begins the next.
    """

    def __init__(self, end: int) -> None:
        self._first: list[int] = [end]

    def next(self, drawn: int) -> int:
        """The next token of the row: the end token first."""
        return self._first.pop() if self._first else drawn


class Conversations:
    """Conversations by a script, one after another. Half of the answers are followed by another turn of the
    user's, at random; those that call, by what the tool gives.
    """

    def __init__(
        self,
        script: Script,
        ends: Collection[int],
        decode: Callable[[Sequence[int]], str],
        *,
        length: int,
        seed: int,
    ) -> None:
        """`ends` are tokens that end what somebody says, `length` that of the row, `seed` the row's own."""
        self._script, self._ends, self._decode = script, frozenset(ends), decode
        self._limits = {role: max(_LEAST, limit * length // _OF) for role, limit in _LIMITS.items()}
        self._random = Random(seed)
        self._said: list[int] = []
        self._role, self._forced = _USER, list(script.start)

    def next(self, drawn: int) -> int:
        """The next token of the row: the template's, if it is its turn."""
        if not self._forced and (drawn in self._ends or len(self._said) >= self._limits[self._role]):
            self._turn()
        if self._forced:
            return self._forced.pop(0)
        self._said.append(drawn)
        return drawn

    def _turn(self) -> None:
        """Let another speak."""
        script, said, self._said = self._script, self._said, []
        if self._role == _USER:
            self._role, forced = _ANSWER, script.answer
        elif self._role == _RESULT:
            self._role, forced = _ANSWER, script.after
        elif script.result is not None and script.call and script.call in self._decode(said):
            self._role, forced = _RESULT, script.result
        elif script.again is not None and self._random.random() < 0.5:
            self._role, forced = _USER, script.again
        else:
            self._role, forced = _USER, script.end + script.start
        self._forced = list(forced)

"""Stop strings: end an answer where one of them begins, without having shown a part of it."""

from collections.abc import Sequence

from olmo3_mlx.errors import OptionError


class StopStrings:
    """Watches text as it comes, in whatever pieces, and holds back what may become a stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises OptionError for an empty stop string."""
        if "" in strings:
            raise OptionError("a stop string must not be empty")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be shown now. Once a stop string is `found`, all before it and nothing more."""
        if self.found:
            return ""
        self._held += text
        at = min((i for s in self._strings if (i := self._held.find(s)) >= 0), default=-1)
        if at >= 0:
            self.found = True
            shown, self._held = self._held[:at], ""
            return shown
        keep = self._unfinished()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back when the text ended: it was no stop string after all."""
        shown, self._held = self._held, ""
        return shown

    def _unfinished(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(s) for s in self._strings), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._strings):
                return length
        return 0

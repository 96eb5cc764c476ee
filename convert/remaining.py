"""How long a work still takes, told from the seconds that its parts took so far."""

from collections.abc import Sequence
from time import monotonic

_KEPT = 0.8  # of what is known, when another part is measured: the newest five count most


class Remaining:
    """The parts of a work, one after another, and the time that those left will take.

        left = Remaining([3.0, 5.0])  # the work of each part, in any unit
        for part in parts:
            stage(f"working{left.in_words}")
            do(part)
            left.end()

    A part begins where the one before ends, unless `begin` is called. What a unit of work takes is the mean
    over the parts measured, the newest of which count most, as others may begin or end to use the machine.
    Parts whose work is 0 are not measured: they are unlike the others.
    """

    def __init__(self, works: Sequence[float]) -> None:
        self._works = list(works)
        self._begun = monotonic()
        self._spent = self._seconds = self._work = 0.0  # measured in all, and as far as it counts

    def begin(self) -> None:
        """The next part begins only now."""
        self._begun = monotonic()

    def end(self) -> None:
        """The part that was begun is done."""
        work, now = self._works.pop(0), monotonic()
        if work:
            self._spent += now - self._begun
            self._seconds = _KEPT * self._seconds + now - self._begun
            self._work = _KEPT * self._work + work
        self._begun = now

    @property
    def seconds(self) -> float | None:
        """The seconds that the parts left will take; None while none was measured."""
        return self._seconds / self._work * sum(self._works) if self._work else None

    @property
    def in_words(self) -> str:
        """The same as the end of a stage's title, ", about 12 min left"; empty while it is not known, and
        where it is less than a minute in a work that took none either.
        """
        if self.seconds is None or not self._works:
            return ""
        if self.seconds < 60:
            return ", less than a minute left" if self._spent >= 60 else ""
        minutes = round(self.seconds / 60)
        if minutes < 90:
            return f", about {minutes} min left"
        hours, minutes = divmod(10 * round(self.seconds / 600), 60)
        return f", about {hours} h {minutes} min left" if minutes else f", about {hours} h left"

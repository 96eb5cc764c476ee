"""What same_output.py runs, one file a kind of work."""

from itertools import chain

from same_output_cases import answering, converting, fetching, looking, refusing, talking
from same_output_cases.case import Case


def cases() -> list[Case]:
    """All of them, each name once."""
    rooms = (answering, refusing, talking, looking, converting, fetching)
    found = list(chain.from_iterable(room.cases() for room in rooms))
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, twice
    return found

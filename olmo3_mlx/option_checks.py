"""Options are checked: numbers lie in their range, keywords are some that there are."""

from collections.abc import Callable, Iterable

from olmo3_mlx.errors import OptionError


def check_number(
    name: str, value: object, valid: Callable[[float], bool], expected: str, *, whole: bool = False
) -> None:
    """Raise OptionError unless `value` is a (whole) number that is `valid`."""
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not valid(value):
        kind = "a whole number" if whole else "a number"
        raise OptionError(f"{name} must be {kind} {expected}, not {value!r}")


def check_keywords(given: Iterable[str], expected: type) -> None:
    """Raise TypeError for a keyword that is no key of the TypedDict `expected`."""
    known = expected.__annotations__
    if unknown := sorted(set(given) - known.keys()):
        raise TypeError(f"unknown option {unknown[0]}: expected {', '.join(known)}")

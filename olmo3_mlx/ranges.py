"""Options that are numbers: each in its range, or an error that says which."""

from collections.abc import Callable

from olmo3_mlx.errors import OptionError


def check_number(
    name: str, value: object, valid: Callable[[float], bool], expected: str, *, whole: bool = False
) -> None:
    """Raise OptionError unless `value` is a (whole) number that is `valid`."""
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not valid(value):
        kind = "a whole number" if whole else "a number"
        raise OptionError(f"{name} must be {kind} {expected}, not {value!r}")

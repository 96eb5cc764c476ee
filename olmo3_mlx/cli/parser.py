"""How a command line is read: argparse, whose errors say what may have been meant."""

import argparse
import sys
from itertools import pairwise
from typing import Any, NoReturn

from olmo3_mlx.cli.nearest import did_you_mean, nearest

_REQUIRED = "the following arguments are required: "  # as argparse says it


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose verbs refuse what they do not know themselves, with their own usage, and whose
    errors name the verb, flag or choice that is most like the wrong one: the same on every Python.
    """

    _given: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; but what is not known is an error, also of a verb's arguments."""
        self._given = tuple(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(list(self._given), namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the usage, the message and what may have been meant; exit with 2."""
        super().error(message + self._flag_meant() + self._swallowed(message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an action's choices."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        meant = did_you_mean(str(value), choices)
        raise argparse.ArgumentError(
            action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){meant}"
        )

    def _swallowed(self, message: str) -> str:
        """The flag that took what an error misses, if there is one that takes all that follows it."""
        missing = message.removeprefix(_REQUIRED)
        if missing == message:
            return ""
        for flag, value in pairwise(self._given):
            action = self._option_string_actions.get(flag)
            if action is not None and action.nargs in ("*", "+") and not value.startswith("-"):
                return f": {flag} took what follows it: write {missing.replace(',', '')} before {flag}"
        return ""

    def _flag_meant(self) -> str:
        """The flag that is like the first wrong one, whatever the error: a wrong flag has many effects."""
        known = self._option_string_actions
        for argument in self._given:
            if argument == "--":
                break
            flag = argument.partition("=")[0]
            if flag.startswith("--") and not any(each.startswith(flag) for each in known):
                meant = nearest(flag, (each for each in known if each.startswith("--")))
                return "" if meant is None else f"; did you mean {meant} instead of {flag}?"
        return ""

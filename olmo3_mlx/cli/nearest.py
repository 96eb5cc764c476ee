"""What somebody may have meant who wrote a word that there is not."""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from olmo3_mlx.errors import HubError, Olmo3Error, UnknownNameError, UnknownRevisionError
from olmo3_mlx.published import SIZES


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is most like `word`, whatever their case and dashes; None if none is."""
    from difflib import get_close_matches  # noqa: PLC0415  (here, as most command lines are right)

    plain = {_plain(each): each for each in known}
    close = 0.5 if len(_plain(word)) < 3 else 0.6  # half of `8b` is that of `7b`
    found = get_close_matches(_plain(word), plain, n=1, cutoff=close)
    return plain[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a line that refuses `word`; empty if nothing is like it."""
    meant = nearest(word, known)
    return "" if meant is None else f"; did you mean {meant}?"


def model_meant(error: Olmo3Error, args: Namespace) -> str:
    """The end of a line that refuses a model's name; empty for other errors, and if nothing is like it."""
    if isinstance(error, UnknownNameError):
        return did_you_mean(error.name, _models_near(error.name, sizes=args.verb == "inspect"))
    if isinstance(error, HubError) and not isinstance(error, UnknownRevisionError):
        # What has one slash in it may be a hub id or the path of a folder.
        named = (value for value in vars(args).values() if isinstance(value, str) and "/" in value)
        name = next((value for value in named if str(error).startswith(value)), "")
        return did_you_mean(name, _models_near(name, sizes=False))
    return ""


def _models_near(name: str, sizes: bool) -> Iterator[str]:
    """The names that a model could have here: those built in, and checkpoints beside where it would lie."""
    if "/" not in name:
        yield "demo"
        yield from SIZES if sizes else ()
    try:
        yield from (
            str(folder)
            for folder in Path(name).expanduser().parent.iterdir()
            if (folder / "config.json").is_file()
        )
    except (OSError, RuntimeError, ValueError):  # no folder, or no name that a folder could have
        return


def _plain(word: str) -> str:
    return word.lower().lstrip("-")

"""What may be asked of a conversion, checked before any work."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Any

import mlx.core as mx

from convert.recipe import uniform
from olmo3_mlx.errors import OptionError

_SWITCH = ((bool,), "True or False")
_EXPECTED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "source": ((str, Path), "a folder or a hub id"),
    "dest": ((str, Path), "a folder"),
    "bits": ((int, NoneType, EllipsisType), "a whole number or None"),
    "group_size": ((int, NoneType), "a whole number or None"),
    "mode": ((str,), "a name"),
    "recipe": ((str, Path, NoneType), "a name, a file or None"),
    "dtype": ((str, mx.Dtype, NoneType), "a name or None"),
    "calibrate": ((bool, str, Path), "True, False or a text file"),
    "target_bpw": ((float, int, NoneType), "a number or None"),
    "revision": ((str, NoneType), "a branch, tag or commit, or None"),
    "tokenizer": ((str, Path, NoneType), "a folder, a hub id or None"),
    "resume": _SWITCH,
    "keep": _SWITCH,
    "card": ((bool, NoneType), "True, False or None"),
    "text": ((str, Path, NoneType), "a text file or None"),
    "upload_to": ((str, NoneType), "a repository's name or None"),
    "progress": ((Callable, NoneType), "a function or None"),  # type: ignore[dict-item]
    "stage": ((Callable, NoneType), "a function or None"),  # type: ignore[dict-item]
}


def check_options(options: Mapping[str, Any]) -> str:
    """What of `convert.convert`'s options shapes the result, as they are written on a command line.

    Raises OptionError for one that is of another type than it takes, or that another, or its absence, would
    make nothing of.
    """
    _check_types(options)
    _check_together(options)
    return _spelled(options)


def _spelled(options: Mapping[str, Any]) -> str:
    said: dict[str, Any] = {"--target-bpw": options["target_bpw"], "--recipe": options["recipe"]}
    if options["target_bpw"] is None and options["recipe"] is None:
        mode = options["mode"]
        said["--bits"] = uniform(mode=mode).bits if options["bits"] is ... else options["bits"]
        said["--group-size"] = options["group_size"]
        said["--mode"] = mode if mode != "affine" else None
    said["--calibrate"] = options["calibrate"] or None
    said["--dtype"] = options["dtype"] and str(options["dtype"]).rpartition(".")[2]
    said["--tokenizer"] = options["tokenizer"]
    return shlex.join(
        name if value is True else f"{name}={value}" for name, value in said.items() if value is not None
    )


def _check_types(options: Mapping[str, Any]) -> None:
    for name, (types, expected) in _EXPECTED.items():
        value = options[name]
        truth_for_a_number = isinstance(value, bool) and bool not in types
        if truth_for_a_number or not isinstance(value, types) or (name == "calibrate" and value == ""):
            raise OptionError(f"{name} must be {expected}, not {value!r}")


def _check_together(options: Mapping[str, Any]) -> None:
    given = isinstance(options["bits"], int)
    recipe, group_size, target = options["recipe"], options["group_size"], options["target_bpw"]
    only_cast = options["bits"] is None and recipe is None
    if only_cast and (group_size is not None or options["mode"] != "affine"):
        name = "mode (--mode)" if group_size is None else "group_size (--group-size)"
        raise OptionError(f"{name} is for quantizing: give bits (--bits) too, or leave it out to only cast")
    if recipe is not None and (given or group_size is not None or options["mode"] != "affine"):
        raise OptionError("a recipe says bits, group size and mode: give either it or those")
    if target is not None and (given or group_size is not None):
        name = "bits" if given else "group_size"
        raise OptionError(f"target_bpw (--target-bpw) chooses bits and group sizes itself: leave out {name}")
    if (options["card"] or options["text"] is not None) and not options["keep"]:
        raise OptionError(
            "a card needs the original again: give either card (--card, --text) or keep=False (--no-keep)"
        )
    if options["text"] is not None and options["card"] is False:
        raise OptionError(
            "text (--text) is what the card measures on: give card=True (no --no-card), or leave out the text"
        )
    if options["text"] is not None and options["card"] is None and only_cast:
        raise OptionError(
            "text (--text) is what the card measures on, and a cast gets none unless asked: give card=True "
            "(--card), or leave out the text"
        )

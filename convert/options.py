"""What may be asked of a conversion, checked before any work."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import mlx.core as mx

from olmo3_mlx.errors import OptionError

_SWITCH = ((bool,), "True or False")
_EXPECTED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "source": ((str, Path), "a folder or a hub id"),
    "dest": ((str, Path), "a folder"),
    "bits": ((int, NoneType), "a whole number or None"),
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
}


def check_types(options: Mapping[str, Any]) -> None:
    """Raise OptionError for one of `convert.convert`'s options that is of another type than it takes."""
    for name, (types, expected) in _EXPECTED.items():
        value = options[name]
        truth_for_a_number = isinstance(value, bool) and bool not in types
        if truth_for_a_number or not isinstance(value, types) or (name == "calibrate" and value == ""):
            raise OptionError(f"{name} must be {expected}, not {value!r}")

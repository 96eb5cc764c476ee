"""What may be asked of a conversion: anything else gets one line that says so, before any work."""

from pathlib import Path
from typing import Any

import pytest

from convert import convert as to_mlx
from olmo3_mlx.errors import OptionError


def refused(source: Path, words: str, /, **options: Any) -> None:
    dest = source.with_name("dest")
    with pytest.raises(OptionError, match=words):
        to_mlx(**{"source": source, "dest": dest, **options})
    assert not list(source.parent.glob("*dest*"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("source", 5, "a folder or a hub id"),
        ("source", None, "a folder or a hub id"),
        ("dest", b"dest", "a folder"),
        ("dest", None, "a folder"),
        ("bits", 4.0, "a whole number or None"),
        ("bits", "4", "a whole number or None"),
        ("bits", True, "a whole number or None"),
        ("group_size", 64.0, "a whole number or None"),
        ("mode", None, "a name"),
        ("mode", ["affine"], "a name"),
        ("recipe", 4, "a name, a file or None"),
        ("recipe", {"bits": 4}, "a name, a file or None"),
        ("dtype", 16, "a name or None"),
        ("calibrate", None, "True, False or a text file"),
        ("calibrate", "", "True, False or a text file"),
        ("target_bpw", "4", "a number or None"),
        ("target_bpw", True, "a number or None"),
        ("revision", 1, "a branch, tag or commit, or None"),
        ("tokenizer", 1, "a folder, a hub id or None"),
        ("resume", "no", "True or False"),
        ("keep", None, "True or False"),
        ("card", "yes", "True, False or None"),
        ("text", ["text"], "a text file or None"),
        ("upload_to", Path("you/model"), "a repository's name or None"),
    ],
)
def test_an_option_of_another_type_is_refused_with_what_was_expected(
    tiny_checkpoint: Path, name: str, value: Any, expected: str
) -> None:
    refused(tiny_checkpoint, rf"^{name} must be {expected}, not ", **{name: value})

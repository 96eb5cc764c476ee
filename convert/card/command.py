"""The command that measures two checkpoints against each other, as users run it again."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path


def own_name(name: str | Path) -> str:
    """A card's name for a hub id, a folder or a file: without its path, which tells of its owner."""
    path = Path(name).expanduser()
    if not path.exists():
        return str(name)
    return path.resolve().name if path.name in ("", "..") else path.name


@dataclass(frozen=True)
class CompareCommand:
    """`olmo3 compare` for the checkpoints `a` and `b`; an option that is None is left out."""

    a: str
    b: str
    card: str | Path | None = None
    tokens: int | None = None
    length: int | None = None
    text: Sequence[str | Path] | None = None
    tokenizer: str | Path | None = None
    revision_a: str | None = None
    revision_b: str | None = None

    def __str__(self) -> str:
        """The command as a shell takes it."""
        parts = ["olmo3", "compare", self.a, self.b]
        for option in fields(self)[2:]:
            value = getattr(self, option.name)
            if value is not None:
                values = value if option.name == "text" else [value]
                parts += [f"--{option.name.replace('_', '-')}", *map(str, values)]
        return shlex.join(parts)

    def without_paths(self) -> "CompareCommand":
        """The same command with folders and files by their own names."""
        text = None if self.text is None else tuple(map(own_name, self.text))
        tokenizer = None if self.tokenizer is None else own_name(self.tokenizer)
        return replace(self, a=own_name(self.a), b=own_name(self.b), text=text, tokenizer=tokenizer)

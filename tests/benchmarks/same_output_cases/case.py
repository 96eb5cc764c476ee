"""A case of same_output.py: commands, run one after another in a folder of their own in which everything of
materials.py is seen under its name.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

SUM = '"What is 17 + 25?" --seed 1'  # the demo samples unless told otherwise
GREEDY = "--temperature 0"


@dataclass(frozen=True)
class Step:
    """One command: `arguments` of olmo3, or a line of bash in which $OLMO3 and $PYTHON start the checkout's.
    With `first` it is the checkout BEFORE that runs it on both sides, so that what it leaves is gone on with.
    """

    arguments: tuple[str, ...] = ()
    bash: str = ""
    stdin: bytes = b""
    terminal: bool = False  # stdin is one
    first: bool = False
    interrupt_at: str = ""  # Ctrl-C is pressed as soon as this file is there
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """As it would be typed."""
        return self.bash or shlex.join(("olmo3", *self.arguments))


@dataclass(frozen=True)
class Case:
    """Commands, and what they need: "lab" (../shared) or "hub" (a hub of our own) or nothing. `slow` ones
    are left out unless asked for; `files` says whether the files are compared too.
    """

    name: str
    steps: tuple[Step, ...]
    needs: str = ""
    slow: bool = False
    files: bool = True


def step(line: str, stdin: str | bytes = b"", **more: object) -> Step:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    return replace(Step(tuple(shlex.split(line)), stdin=data), **more)  # type: ignore[arg-type]


def bash(line: str, stdin: str = "", **more: object) -> Step:
    return replace(Step(bash=line, stdin=stdin.encode()), **more)  # type: ignore[arg-type]


def group(name: str, lines: dict[str, str], **more: object) -> Iterator[Case]:
    """Cases of one command each."""
    for what, line in lines.items():
        yield replace(Case(f"{name}: {what}", (step(line),)), **more)  # type: ignore[arg-type]

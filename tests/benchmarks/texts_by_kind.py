"""What results are measured on, kind by kind: text beside the repository that nothing is calibrated on."""

import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from convert.texts.files import read_files
from convert.texts.kinds import Label, Tokenized
from convert.texts.sequences import as_many_of_each
from olmo3_mlx import Tokenizer

KINDS = ("novels", "documents", "code", "conversations")
NOVELS = ("wuthering_heights", "treasure_island")
SEQUENCES, LENGTH = 4, 1024  # of each kind
_END = "<|endoftext|>"


def spans(shared: Path, tokenizer: Tokenizer, extra: Path | None = None) -> dict[str, mx.array]:
    """The sequences [N, L] of each kind: from the last 30 % of the texts in `shared`, and from all of
    `extra`, a kind by its name, if there is one.
    """
    each = SEQUENCES // len(NOVELS)
    found = {
        "novels": [
            row
            for name in NOVELS
            for row in _cut(tokenizer, [_end(_read(shared / "text" / f"{name}.txt"))], each)
        ],
        "documents": _cut(tokenizer, [_end(_read(shared / "text" / "documents.txt"))], SEQUENCES),
        "code": _cut(tokenizer, [_end(standard_library())], SEQUENCES),
        "conversations": _cut(
            tokenizer, _conversations(_end(_read(shared / "text" / "conversations.txt"))), SEQUENCES
        ),
    }
    if extra is not None:
        text = read_files([extra], tokenizer)[0]
        found[extra.name] = _rows(text.tokenized(tokenizer), SEQUENCES)
    return {kind: mx.array(rows) for kind, rows in found.items()}


def standard_library() -> str:
    """Modules beside the running interpreter: every second of those from a to j, the beginning of each."""
    files = sorted(Path(os.__file__).parent.glob("[a-j]*.py"))[::2]
    return "\n".join(_read(file)[:12_000] for file in files)


def _conversations(text: str) -> list[str]:
    """The whole ones of a text that begins within one."""
    return [f"{said}{_END}" for said in text.split(_END)[1:] if said.strip()]


def _end(text: str) -> str:
    return text[int(0.7 * len(text)) :]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _cut(tokenizer: Tokenizer, documents: Sequence[str], count: int) -> list[list[int]]:
    ids = tuple(tokenizer.encode(document) for document in documents)
    return _rows(Tokenized(Label("", "a text", ""), ids), count)


def _rows(text: Tokenized, count: int) -> list[list[int]]:
    """Raises OptionError if it is too short."""
    return as_many_of_each([text], LENGTH, count).tokens.tolist()  # type: ignore[return-value]

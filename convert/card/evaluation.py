"""The text that a card is measured on: read, cut into tokens, and turned back where the card shows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from convert.reading.texts import DEFAULT_ABOUT, DEFAULT_NAME, read_text, sha256, text_tokens
from olmo3_mlx.errors import OptionError, Setting
from olmo3_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure on: what cards call it, its SHA-256, the tokens [N, L] that are read of it, and the
    function that turns ids into text; `about` says what kind of text it is, if that is known.
    """

    name: str
    sha256: str
    tokens: mx.array
    decode: Callable[[Sequence[int]], str]
    about: str = ""

    @property
    def described(self) -> str:
        """Its name, and what it is, for readers who wonder at perplexities on it."""
        return f"{self.name} ({self.about})" if self.about else self.name

    @classmethod
    def read(cls, file: Path | None, tokenizer: Tokenizer, count: int, length: int) -> "EvaluationText":
        """Read about `count` tokens in sequences of `length`, from a text file or that of this package.

        Raises OptionError for a file that cannot be read or is too short.
        """
        if count < 2:
            raise OptionError(Setting("tokens"), f" must be at least 2, not {count}")
        text, length = read_text(file), min(length, count)
        return cls(
            name=DEFAULT_NAME if file is None else file.name,
            sha256=sha256(text),
            tokens=text_tokens(text, tokenizer, length, max(1, count // max(1, length))),
            decode=tokenizer.decode,
            about=DEFAULT_ABOUT if file is None else "",
        )

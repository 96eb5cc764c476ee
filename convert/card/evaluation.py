"""What a card is measured on: a text, its tokens, and what turns ids back into it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from convert.card.page import Measured
from convert.card.verdict import Quantized
from convert.reading.texts import DEFAULT_NAME, read_text, sha256, text_tokens
from olmo3_mlx.errors import OptionError
from olmo3_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """A text to measure on: what it is and its SHA-256, tokens [N, L] from it, and what turns ids back."""

    text: str
    text_sha256: str
    tokens: mx.array
    decode: Callable[[Sequence[int]], str]
    file: Path | None = None

    @property
    def options(self) -> list[str]:
        """What `olmo3 compare` is to be told for the same tokens, beside the text's file."""
        count, length = self.tokens.shape
        text = [] if self.file is None else ["--text", self.file.name]
        return [*text, "--tokens", str(count * length), "--length", str(length)]

    @classmethod
    def make(cls, file: Path | None, tokenizer: Tokenizer, count: int, length: int) -> "Evaluation":
        """About `count` tokens in sequences of `length`, from a text file or the one that comes with this.

        Raises OptionError for a file that cannot be read or is too short.
        """
        if count < 2:
            raise OptionError(f"expected 2 or more tokens to measure on, not {count}")
        text, length = read_text(file), min(length, count)
        return cls(
            text=DEFAULT_NAME if file is None else file.name,
            text_sha256=sha256(text),
            tokens=text_tokens(text, tokenizer, length, max(1, count // max(1, length))),
            decode=tokenizer.decode,
            file=file,
        )

    def measured(
        self, original: str, result: str, command: str, made: Quantized, quantized: str = ""
    ) -> Measured:
        """For the card of two checkpoints by these names, the second `made` so: `command` does it again.
        `quantized` says how the original is, if it is.
        """
        return Measured(
            original=original,
            result=result,
            text=self.text,
            text_sha256=self.text_sha256,
            tokens=self.tokens,
            command=command,
            decode=self.decode,
            made=made,
            quantized=quantized,
        )

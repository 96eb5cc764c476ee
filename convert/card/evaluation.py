"""The texts that a card is measured on: cut into tokens, and turned back where the card shows them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from convert.texts.files import read_files
from convert.texts.kinds import Text
from convert.texts.sequences import TextRead, as_many_of_each
from convert.texts.shipped import evaluation_texts
from olmo3_mlx.errors import OptionError, Setting
from olmo3_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvaluationTexts:
    """Texts to measure on: their tokens [N, L], as many of each, the kind of each of the N sequences, what
    was read of which text, and the function that turns ids into text.
    """

    tokens: mx.array
    kinds: tuple[str, ...]
    texts: tuple[TextRead, ...]
    decode: Callable[[Sequence[int]], str]

    @property
    def described(self) -> str:
        """The texts as a part of a sentence."""
        labels = [text.label for text in self.texts]
        if len(labels) == 1:
            return labels[0].described
        return f"{len(labels)} texts ({', '.join(label.kind for label in labels)})"

    @classmethod
    def cut(cls, texts: Sequence[Text], tokenizer: Tokenizer, count: int, length: int) -> "EvaluationTexts":
        """Cut about `count` tokens in sequences of `length` out of each text.

        Raises OptionError for a text that is too short, and for a count or length that cannot be.
        """
        if count < 2:
            raise OptionError(Setting("tokens"), f" must be at least 2, not {count}")
        length = min(length, count)
        tokenized = [text.tokenized(tokenizer) for text in texts]
        found = as_many_of_each(tokenized, length, max(1, count // max(1, length)))
        return cls(found.tokens, found.kinds, found.texts, tokenizer.decode)


def texts_to_measure_on(files: Sequence[Path] | None, tokenizer: Tokenizer) -> tuple[Text, ...]:
    """A user's files as texts, or those that come with this package. Raises what `read_files` raises."""
    return evaluation_texts(tokenizer) if files is None else read_files(files, tokenizer)

"""A text of a kind: what cards call it, and what it holds, as words or as tokens.

The kinds that come with this package are below. A user's file is a kind by itself, with the file's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from olmo3_mlx.text.tokenizer import Tokenizer

PROSE, DOCUMENTS, CODE, MATHEMATICS = "prose", "documents", "code", "mathematics"
QUESTIONS, LANGUAGES, CONVERSATIONS = "questions", "languages", "conversations"
SELF = "self"  # what the model wrote that is calibrated
CHATS = "chats"  # conversations that are saved on this machine


@dataclass(frozen=True)
class Label:
    """What cards say of a text: its kind, its name, the SHA-256 of its file in hexadecimal digits, and what
    it is about, if that is known.
    """

    kind: str
    name: str
    sha256: str
    about: str = ""

    @property
    def described(self) -> str:
        """Its name, and what it is, for readers who wonder at perplexities on it."""
        return f"{self.name} ({self.about})" if self.about else self.name


@dataclass(frozen=True)
class Tokenized:
    """A text as token ids, one sequence of them a document. What a model said itself is this from the
    start.
    """

    label: Label
    documents: tuple[Sequence[int], ...]

    @property
    def count(self) -> int:
        """The number of its tokens."""
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class Text:
    """A text as words: documents that have nothing to do with each other, such as conversations."""

    label: Label
    documents: tuple[str, ...]

    def tokenized(self, tokenizer: Tokenizer) -> Tokenized:
        """Its documents as ids. Special tokens that stand in them count as such."""
        return Tokenized(self.label, tuple(tokenizer.encode(document) for document in self.documents))

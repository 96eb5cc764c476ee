"""The texts that a model is calibrated on: cut into tokens, and named in the result's cards."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.texts.files import read_files
from convert.texts.kinds import SELF, Label, Text, Tokenized
from convert.texts.sequences import TextRead, shared_out
from convert.texts.shipped import calibration_texts
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.text.tokenizer import Tokenizer
from olmo3_mlx.token_ids import check_token_ids

_TOKENS = 32768  # in sequences of _LENGTH, or what the texts have
_LEAST_TOKENS = 8192  # that they must have
_LENGTH = 512
_WRITTEN_TOKENS = 16384  # that a model writes itself at most


@dataclass(frozen=True)
class CalibratedOn:
    """What cards say of the texts: which they are, and how much of each was read."""

    texts: tuple[TextRead, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens read of all of them."""
        return sum(text.tokens for text in self.texts)

    @property
    def in_words(self) -> str:
        """The texts as a part of a sentence."""
        labels = [text.label for text in self.texts]
        if len(labels) == 1:
            which = f"{labels[0].described} (SHA-256 `{labels[0].sha256[:16]}…`)"
        else:
            which = f"{len(labels)} texts ({', '.join(label.kind for label in labels)})"
        return f"{self.tokens:,} tokens of {which}"

    def saw(self, sha256: str) -> bool:
        """Whether the text with this SHA-256 is one of them."""
        return any(text.label.sha256 == sha256 for text in self.texts)

    def figures(self) -> dict[str, Any]:
        """What programs are told of them."""
        return {"tokens": self.tokens, "texts": [text.figures() for text in self.texts]}

    @classmethod
    def from_figures(cls, file: Path) -> "CalibratedOn | None":
        """Read what a card's quality.json says, of either schema; None if there is no such file, or it says
        nothing of it.
        """
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))["calibration"]
            if "texts" not in entry:  # schema 1 knows one text, and not how it was cut
                name = str(entry["name"])
                return cls((TextRead(Label(name, name, str(entry["sha256"])), 1, int(entry["tokens"])),))
            return cls(tuple(_read(each) for each in entry["texts"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class CalibrationText:
    """Texts to calibrate on: their tokens [N, L], the kind of each of the N sequences, and what cards say of
    them. The kinds are mixed: any first sequences hold a fair share of each.

    `sha256` tells these texts from others, in hexadecimal digits. It is that of their tokens, with zeros for
    those that the model wrote itself, as it is known before: see TextsToRead.
    """

    tokens: mx.array
    kinds: tuple[str, ...]
    described: CalibratedOn
    sha256: str

    @classmethod
    def read(
        cls, files: Sequence[Path] | None, tokenizer_folder: Path, config: Olmo3Config
    ) -> "CalibrationText":
        """Read a user's files, or the texts that come with this package, for a model with this config.

        Raises OptionError for a text that cannot be read or is too short, TokenizerError, and PromptError for
        tokens outside the vocabulary.
        """
        return TextsToRead.of(files, Tokenizer.from_folder(tokenizer_folder), config).read()

    @classmethod
    def of(
        cls,
        texts: Sequence[Tokenized],
        config: Olmo3Config,
        sha256: str | None = None,
    ) -> "CalibrationText":
        """Share out the tokens to be read among texts, for a model with this config: to each the same.
        `sha256` is by default that of the tokens.

        Raises OptionError for texts that are too short, and PromptError for tokens outside the vocabulary.
        """
        length = sequence_length(config)
        cut = shared_out(texts, length, _TOKENS // length, _LEAST_TOKENS // length)
        check_token_ids(cut.tokens, config.vocab_size)
        return cls(cut.tokens, cut.kinds, CalibratedOn(cut.texts), sha256 or _sha256(cut.tokens))


@dataclass(frozen=True)
class TextsToRead:
    """Texts before the model has written its own: those that are there, and how many rows it is to write.

    texts    those that are there
    config   the model's
    planned  what is going to be read, with zeros in the place of what the model writes
    """

    texts: tuple[Tokenized, ...]
    config: Olmo3Config
    planned: CalibrationText

    @classmethod
    def of(
        cls,
        files: Sequence[Path] | None,
        tokenizer: Tokenizer,
        config: Olmo3Config,
        *,
        more: Sequence[Text] = (),
        written: bool = False,
    ) -> "TextsToRead":
        """A user's files, or the texts that come with this package; `more` texts; and what the model writes
        if `written`.

        Raises OptionError for a text that cannot be read or is too short, and PromptError for tokens outside
        the vocabulary.
        """
        found = calibration_texts(tokenizer) if files is None else read_files(files, tokenizer)
        texts = tuple(text.tokenized(tokenizer) for text in (*more, *found))
        length = sequence_length(config)
        # The first gets a sequence even where there are more texts than sequences.
        place = Tokenized(Label(SELF, SELF, ""), ((0,) * (_WRITTEN_TOKENS // length * length),))
        planned = CalibrationText.of([place, *texts] if written else texts, config)
        return cls(texts, config, planned)

    @property
    def rows(self) -> int:
        """How many rows the model is to write; each is a sequence of `sequence_length(config)` tokens."""
        return sum(text.sequences for text in self.planned.described.texts if not text.label.sha256)

    def read(self, written: Tokenized | None = None) -> CalibrationText:
        """Cut them, together with what the model has `written`."""
        if written is None:
            return self.planned
        return CalibrationText.of([written, *self.texts], self.config, self.planned.sha256)


def written_by(name: str, ids: Sequence[Sequence[int]], bits: int | None) -> Tokenized:
    """The text that the model called `name` wrote itself, rounded to so many bits if not None."""
    rounded = "" if bits is None else f" rounded to {bits} bits, as the original did not fit"
    about = f"sampled from the checkpoint{rounded}"
    label = Label(SELF, f"what {name} said itself", _sha256(mx.array([list(row) for row in ids])), about)
    return Tokenized(label, tuple(ids))


def _read(entry: dict[str, Any]) -> TextRead:
    label = Label(*(str(entry[key]) for key in ("kind", "name", "sha256", "about")))
    return TextRead(label, int(entry["sequences"]), int(entry["length"]))


def sequence_length(config: Olmo3Config) -> int:
    """The tokens of a sequence, which a model with a short context cannot read whole."""
    return min(_LENGTH, config.max_position_embeddings)


def _sha256(tokens: mx.array) -> str:
    return hashlib.sha256(memoryview(tokens)).hexdigest()  # type: ignore[arg-type]

"""The texts that a model is calibrated on: cut into tokens, and named in the result's cards."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.texts.files import read_files
from convert.texts.kinds import CONVERSATIONS, Label, Tokenized
from convert.texts.sequences import TextRead, shared_out
from convert.texts.shipped import calibration_texts
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.text.tokenizer import Tokenizer
from olmo3_mlx.token_ids import check_token_ids

_TOKENS = 32768  # in sequences of _LENGTH, or what the texts have
_LEAST_TOKENS = 8192  # that they must have
_LENGTH = 512
_WEIGHTS = {CONVERSATIONS: 2}  # shares of the kinds that come with this package; of others it is 1


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
            which = f"{labels[0].name} (SHA-256 `{labels[0].sha256[:16]}…`)"
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
    """

    tokens: mx.array
    kinds: tuple[str, ...]
    described: CalibratedOn

    @classmethod
    def read(
        cls, files: Sequence[Path] | None, tokenizer_folder: Path, config: Olmo3Config
    ) -> "CalibrationText":
        """Read a user's files, or the texts that come with this package, for a model with this config.

        Raises OptionError for a text that cannot be read or is too short, TokenizerError, and PromptError for
        tokens outside the vocabulary.
        """
        tokenizer = Tokenizer.from_folder(tokenizer_folder)
        texts = calibration_texts(tokenizer) if files is None else read_files(files, tokenizer)
        tokenized = [text.tokenized(tokenizer) for text in texts]
        return cls.of(tokenized, config, _WEIGHTS if files is None else {})

    @classmethod
    def of(
        cls, texts: Sequence[Tokenized], config: Olmo3Config, weights: Mapping[str, int]
    ) -> "CalibrationText":
        """Share out the tokens to be read among texts, for a model with this config: to each the same, or as
        many times as much as `weights` says of its kind.

        Raises OptionError for texts that are too short, and PromptError for tokens outside the vocabulary.
        """
        length = min(_LENGTH, config.max_position_embeddings)
        cut = shared_out(texts, length, _TOKENS // length, _LEAST_TOKENS // length, weights)
        check_token_ids(cut.tokens, config.vocab_size)
        return cls(cut.tokens, cut.kinds, CalibratedOn(cut.texts))


def _read(entry: dict[str, Any]) -> TextRead:
    label = Label(*(str(entry[key]) for key in ("kind", "name", "sha256", "about")))
    return TextRead(label, int(entry["sequences"]), int(entry["length"]))

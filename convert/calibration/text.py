"""The text that a model is calibrated on: read, cut into tokens, and named in the result's cards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from convert.reading.texts import CALIBRATION_NAME, CALIBRATION_TEXT, read_text, sha256, text_tokens
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.text.tokenizer import Tokenizer
from olmo3_mlx.token_ids import check_token_ids

_TOKENS = 32768  # in sequences of _LENGTH, or what a text has
_LEAST_TOKENS = 8192  # that it must have
_LENGTH = 512


class CalibratedOn(NamedTuple):
    """What a card says of the text: its file's name, its SHA-256, and how many tokens of it were read."""

    name: str
    sha256: str
    tokens: int

    @property
    def in_words(self) -> str:
        """The text as a part of a sentence."""
        return f"{self.tokens:,} tokens of {self.name} (SHA-256 `{self.sha256[:16]}…`)"

    @classmethod
    def from_figures(cls, file: Path) -> "CalibratedOn | None":
        """Read what a card's quality.json says; None if there is no such file, or it says nothing of it."""
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))["calibration"]
            return cls(str(entry["name"]), str(entry["sha256"]), int(entry["tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate on: its tokens [N, L], and what a card says of it."""

    tokens: mx.array
    described: CalibratedOn

    @classmethod
    def read(cls, file: Path | None, tokenizer_folder: Path, config: Olmo3Config) -> "CalibrationText":
        """Read a text file, or the one that comes with this package, for a model with this config.

        Raises OptionError for a text that cannot be read or is too short, TokenizerError, and PromptError for
        tokens outside the vocabulary.
        """
        text = read_text(CALIBRATION_TEXT if file is None else file)
        length = min(_LENGTH, config.max_position_embeddings)
        tokens = text_tokens(
            text,
            Tokenizer.from_folder(tokenizer_folder),
            length,
            _TOKENS // length,
            least=_LEAST_TOKENS // length,
        )
        check_token_ids(tokens, config.vocab_size)
        name = CALIBRATION_NAME if file is None else file.name
        return cls(tokens, CalibratedOn(name, sha256(text), tokens.size))

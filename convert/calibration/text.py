"""What a result was calibrated on, as its cards say it."""

import json
from pathlib import Path
from typing import NamedTuple


class CalibratedOn(NamedTuple):
    """A text: its file's name, its SHA-256, and how many tokens of it were read."""

    name: str
    sha256: str
    tokens: int

    @property
    def in_words(self) -> str:
        """As a sentence's part."""
        return f"{self.tokens:,} tokens of {self.name} (SHA-256 `{self.sha256[:16]}…`)"

    @classmethod
    def told(cls, figures: Path) -> "CalibratedOn | None":
        """What a card's quality.json says; None if there is none, or it says nothing of it."""
        try:
            found = json.loads(figures.read_text(encoding="utf-8"))["calibration"]
            return cls(str(found["name"]), str(found["sha256"]), int(found["tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

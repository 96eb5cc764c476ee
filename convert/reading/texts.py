"""Texts to measure and to calibrate on, read from files and cut into sequences of tokens."""

import hashlib
from pathlib import Path

import mlx.core as mx

from olmo3_mlx.errors import OptionError
from olmo3_mlx.text.tokenizer import Tokenizer

DEFAULT_TEXT = Path(__file__).parents[1] / "text" / "evaluation.txt"
CALIBRATION_TEXT = DEFAULT_TEXT.with_name("calibration.txt")
DEFAULT_NAME = "the text that comes with olmo3-mlx"
DEFAULT_ABOUT = "English prose of 1730 to 1876: Newton, the Constitution of the United States, Mark Twain"
CALIBRATION_NAME = "the calibration text that comes with olmo3-mlx"


def read_text(file: Path | None = None) -> str:
    """Read a text file, or the one that comes with this package (convert/text/README.md says what it is).

    Raises OptionError if it cannot be read as UTF-8.
    """
    file = DEFAULT_TEXT if file is None else file
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{file}: the text cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(f"{file}: expected a text in UTF-8") from None


def sha256(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_tokens(
    text: str, tokenizer: Tokenizer, length: int, count: int, *, least: int | None = None
) -> mx.array:
    """Cut `count` sequences of `length` tokens, evenly spread, out of a text: [N, L], N = count, L = length;
    or as many as it has, if that is at least `least` (by default: `count`).

    Special tokens that stand in the text count as such. Raises OptionError if it is too short, and for
    a count or length that cannot be.
    """
    least = count if least is None else least
    if length < 2 or count < 1:
        raise OptionError(f"expected 1 or more sequences of 2 or more tokens, not {count} of {length}")
    ids = tokenizer.encode(text)
    if len(ids) < length * least:
        raise OptionError(
            f"the text is too short: {length * least} tokens are needed ({least} sequences of {length}), "
            f"it has {len(ids)}: give a longer one"
        )
    count = min(count, len(ids) // length)
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    return mx.array([ids[start : start + length] for start in starts])

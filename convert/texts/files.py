"""A user's files as texts: plain text, or conversations in a file of JSON lines (.jsonl)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from convert.texts.conversations import Conversations, check_template, parsed
from convert.texts.kinds import Label, Text
from olmo3_mlx.errors import OptionError, TemplateError
from olmo3_mlx.text.tokenizer import Tokenizer

_CONVERSATIONS = ".jsonl"


def read_files(files: Sequence[Path], tokenizer: Tokenizer) -> tuple[Text, ...]:
    """Read each file as a text of its own kind, which bears its name.

    Raises OptionError for a file that cannot be read or is empty, for one that is named twice, and, with the
    line, for a conversation that is none or that the checkpoint's template refuses.
    """
    _check_apart(files)
    kinds: list[str] = []
    for file in files:
        same = sum(earlier.name == file.name for earlier in files[: len(kinds)])
        kinds.append(f"{file.name} ({same + 1})" if same else file.name)
    return tuple(_read(file, kind, tokenizer) for file, kind in zip(files, kinds, strict=True))


def contents(file: Path) -> tuple[str, str]:
    """A file's text, without a byte order mark and with line ends as Python has them; and the SHA-256 of its
    bytes, in hexadecimal digits.

    Raises OptionError if it cannot be read as UTF-8, or is empty.
    """
    if file.is_dir():
        raise OptionError(f"{file} is a folder: expected a text file, or conversations in a .jsonl file")
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise OptionError(f"{file}: the text cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(f"{file}: expected a text in UTF-8") from None
    if not text.strip():
        raise OptionError(f"{file}: the text is empty")
    return text, hashlib.sha256(data).hexdigest()


def _read(file: Path, kind: str, tokenizer: Tokenizer) -> Text:
    text, sha256 = contents(file)
    label = Label(kind, file.name, sha256)
    if file.suffix.lower() != _CONVERSATIONS:
        return Text(label, (text,))
    check_template(tokenizer, str(file))
    conversations, written = Conversations(tokenizer), []
    for conversation in parsed(text, str(file)):
        try:
            written.append(conversations.written(conversation))
        except TemplateError as error:
            raise OptionError(f"{conversation.place}: ", *error.parts) from None
    return Text(label, tuple(written))


def _check_apart(files: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for file in files:
        before = seen.setdefault(file.resolve(), file)
        if before is not file:
            also = "" if str(before) == str(file) else f" (as {before}, too)"
            raise OptionError(f"{file} is named twice{also}: name each text once")

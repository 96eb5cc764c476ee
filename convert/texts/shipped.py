"""The texts that come with this package; convert/text/README.md says what they are."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from convert.texts.conversations import Conversations, parsed
from convert.texts.files import contents
from convert.texts.kinds import (
    CODE,
    CONVERSATIONS,
    DOCUMENTS,
    LANGUAGES,
    MATHEMATICS,
    PROSE,
    QUESTIONS,
    Label,
    Text,
)
from olmo3_mlx.errors import TemplateError
from olmo3_mlx.text.tokenizer import Tokenizer

_FOLDER = Path(__file__).parents[1] / "text"

_CALIBRATION: Mapping[str, str] = {
    PROSE: "Mark Twain",
    DOCUMENTS: "manuals, reports, letters, notes",
    CODE: "programs, scripts, queries, configuration",
    MATHEMATICS: "arguments and sums in words",
    QUESTIONS: "questions and answers",
    LANGUAGES: "languages other than English",
    CONVERSATIONS: "chats through the checkpoint's template",
}
_EVALUATION: Mapping[str, str] = {
    PROSE: "English of 1730 to 1876: Newton, the Constitution of the United States, Mark Twain",
    DOCUMENTS: "manuals, reports, letters, notes",
    CODE: "programs, scripts, queries, configuration",
    CONVERSATIONS: "chats through the checkpoint's template",
}


def calibration_texts(tokenizer: Tokenizer) -> tuple[Text, ...]:
    """The texts to calibrate on; no conversations for a checkpoint whose template shows few, or
    that has none.
    """
    return _texts("calibration", _CALIBRATION, tokenizer)


def evaluation_texts(tokenizer: Tokenizer) -> tuple[Text, ...]:
    """The texts to measure on, which share no passage with those to calibrate on."""
    return _texts("evaluation", _EVALUATION, tokenizer)


def calibration_tools() -> tuple[Sequence[Mapping[str, Any]], ...]:
    """The tools of each conversation to calibrate on that has any."""
    file = _FOLDER / "calibration" / f"{CONVERSATIONS}.jsonl"
    return tuple(c.tools for c in parsed(contents(file)[0], file.name) if c.tools)


def _texts(folder: str, kinds: Mapping[str, str], tokenizer: Tokenizer) -> tuple[Text, ...]:
    texts = [
        _conversations(_FOLDER / folder, about, tokenizer)
        if kind == CONVERSATIONS
        else _plain(_FOLDER / folder, kind, about)
        for kind, about in kinds.items()
    ]
    return tuple(text for text in texts if text.documents)


def _plain(folder: Path, kind: str, about: str) -> Text:
    text, sha256 = contents(folder / f"{kind}.txt")
    return Text(Label(kind, _name(kind), sha256, about), (text,))


def _conversations(folder: Path, about: str, tokenizer: Tokenizer) -> Text:
    """Those that the template shows whole: one for a Think checkpoint may know no tools. Less than half of
    them are too few to stand for a kind, and then there are none.
    """
    file = folder / f"{CONVERSATIONS}.jsonl"
    text, sha256 = contents(file)
    found, conversations, written = parsed(text, file.name), Conversations(tokenizer), []
    for conversation in found if tokenizer.chat_templates else []:
        with suppress(TemplateError):
            written.append(conversations.written(conversation))
    if len(written) < len(found):
        about = f"{about}, which shows {len(written)} of {len(found)}"
    if 2 * len(written) < len(found):
        written = []
    return Text(Label(CONVERSATIONS, _name(CONVERSATIONS), sha256, about), tuple(written))


def _name(kind: str) -> str:
    return f"{kind} of olmo3-mlx"

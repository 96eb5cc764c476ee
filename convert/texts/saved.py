"""The conversations that are saved on this machine, as a text.

They are somebody's own: cards say how many there were, and nothing that was said, nor their names.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from convert.progress import Notice
from convert.texts.conversations import Conversation, Conversations, check_template
from convert.texts.kinds import CHATS, Label, Text
from olmo3_mlx.conversation.listing import read_conversations
from olmo3_mlx.conversation.place import sessions_folder
from olmo3_mlx.errors import OptionError, SessionError, TemplateError
from olmo3_mlx.text.client_messages import Message
from olmo3_mlx.text.tokenizer import Tokenizer

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_NAMED = 5  # conversations at most, in a notice on several


def saved_conversations(tokenizer: Tokenizer, notice: Notice) -> Text:
    """All of them through a checkpoint's template, whatever model they were had with, in the order of their
    names. `notice` is told which cannot be read, and which the template refuses.

    The label's SHA-256 is that of their messages as JSON. Raises OptionError if none is left, or for a
    checkpoint without a template; SessionError if their folder cannot be read.
    """
    check_template(tokenizer, "saved conversations")
    found, problems = read_conversations()
    for path, problem in problems.items():
        notice(SessionError(f"calibrating without the conversation {path.name}: ", *problem.parts))
    conversations, read, documents = Conversations(tokenizer), [], []
    refused: dict[str, list[str]] = {}  # names, by the reason
    for path, messages in found.items():
        said = [_with_thinking_apart(message) for message in messages]
        try:
            documents.append(conversations.written(Conversation(said, None, path.name)))
            read.append(messages)
        except TemplateError as error:
            refused.setdefault(str(error), []).append(path.name)
    for reason, names in refused.items():
        notice(SessionError(f"calibrating without {_listed(names)}: {reason}"))
    if not read:
        raise _none([*map(str, problems.values()), *refused], len(problems) + len(found))
    name = f"what was said in {_counted(len(read))}"
    return Text(Label(CHATS, name, _sha256(read), "through the checkpoint's template"), tuple(documents))


def _with_thinking_apart(message: Mapping[str, Any]) -> Message:
    """The message as clients have it, with the thinking for itself: what is saved has it in the content."""
    thought = _THOUGHT.fullmatch(message.get("content", "")) if message["role"] == "assistant" else None
    if thought is None:
        return message
    return {**message, "reasoning_content": thought[1], "content": thought[2]}


def _none(reasons: Sequence[str], count: int) -> OptionError:
    """Why there is nothing to calibrate on, though there are so many saved conversations."""
    folder = sessions_folder()
    if not count:
        return OptionError(
            "no conversations are saved on this machine: those of chats with a session's name would lie in "
            f"{folder}"
        )
    return OptionError(f"none of {_counted(count)} in {folder} can be calibrated on: {reasons[0]}")


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the conversation {names[0]}"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"the conversations {', '.join(names[:_NAMED])}{more}"


def _counted(count: int) -> str:
    return f"{count} saved conversation{'' if count == 1 else 's'}"


def _sha256(conversations: Sequence[Sequence[Message]]) -> str:
    return hashlib.sha256(json.dumps(conversations).encode()).hexdigest()

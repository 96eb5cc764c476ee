"""Conversations kept under a name, so that they go on after a restart.

NAME/conversation.json   what was said: all that is needed to go on
NAME/caches/             what the caches held, so that it need not be read again; may be lost
NAME/lock                held by the process that has it open
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.checkpoints.fingerprint import fingerprint
from olmo3_mlx.conversation.messages import are_messages
from olmo3_mlx.conversation.place import BUSY, check_name, former_folder, nothing_said, ready_folder
from olmo3_mlx.durable import is_still, lock, replace_file
from olmo3_mlx.errors import CachesNotSavedError, OptionError, SessionError, TemplateError
from olmo3_mlx.model import Olmo3
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.client_messages import Message, normalized

_FORMAT = 1


class SavedConversation:
    """A conversation on disk. `messages` is what was said, `role` and `content` each, when it was opened.
    `model` is what the model that it was held with was called, if somebody said so; whoever goes on with
    another may set it, so that `save` keeps it.

    with open_conversation("work") as saved:
        session = Session(model, options, files=saved.files(model, options))
        session.resume()
        chat = Chat(model, tokenizer, messages=saved.messages, session=session)
        ...
        saved.save(chat.messages, session)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: str | None = None
        self.messages: list[dict[str, Any]] = self._read()

    def files(self, model: Olmo3, options: CacheOptions) -> SessionFiles:
        """The files in which a session of this model, with caches of these `options`, keeps them."""
        form = options.form(model.config.head_dim, model.dtype)
        return SessionFiles(self.folder / "caches", fingerprint(model), form)

    def save(self, messages: Sequence[Message], session: Session) -> None:
        """Keep what was said, then what the session's caches hold.

        Raises OptionError for messages that could not be read back, SessionError if the disk does not take
        what was said, and CachesNotSavedError if it takes that and not the caches; what was saved
        before stays whole.
        """
        data = _serialized(messages, self.model)
        try:
            replace_file(self._path, lambda new: new.write_bytes(data))
        except OSError as error:
            raise SessionError(f"cannot write to {self.folder}: {error.strerror}") from None
        try:
            session.save()
        except SessionError as error:
            raise CachesNotSavedError(*error.parts) from None

    @property
    def _path(self) -> Path:
        return self.folder / "conversation.json"

    def _read(self) -> list[dict[str, Any]]:
        advice = "move it away to start anew, or choose another name"
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            raise SessionError(f"{self._path} cannot be read: {error}; {advice}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise SessionError(f"{self._path}: expected a conversation in format {_FORMAT}; {advice}")
        messages = data.get("messages")
        if not are_messages(messages):
            raise SessionError(f"{self._path}: expected messages, a role and content each; {advice}")
        model = data.get("model")
        self.model = model if isinstance(model, str) else None
        return messages


def _serialized(messages: Sequence[Message], model: str | None) -> bytes:
    """The file's content. Raises OptionError for messages that could not be read back from it."""
    try:
        held_with = {} if model is None else {"model": model}
        data = {"format": _FORMAT, **held_with, "messages": normalized(messages)}
        serialized = json.dumps(data, ensure_ascii=False, indent=1).encode()
        readable = are_messages(json.loads(serialized)["messages"])
    except (TypeError, ValueError, RecursionError, TemplateError):
        readable = False
    if not readable:
        raise OptionError(
            "these messages cannot be saved: expected a list of them, each with a text for role and for "
            "content (valid Unicode) unless it calls tools, and with nothing that JSON does not have"
        )
    return serialized


@contextmanager
def open_conversation(name: str) -> Iterator[SavedConversation]:
    """The conversation of that name, which is new if there is none, for this process alone. One in which
    nothing was saved leaves nothing behind.

    Raises OptionError for what is no name, SessionError if another process has it open, or it cannot be
    read or made.
    """
    check_name(name)
    sessions, left = ready_folder()
    folder = sessions / name
    busy = f"another process has the session {name} open: close it, or choose another name"
    if name in left:
        moved = f"the session {name} cannot be moved from {former_folder()} to {sessions}: {left[name]}"
        raise SessionError(busy if left[name] == BUSY else moved)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = (folder / "lock").open("w")
    except OSError as error:
        raise SessionError(f"cannot make {folder}: {error.strerror}") from None
    with lock_file:
        # It may have been removed, or moved, between the two.
        if not lock(lock_file) or not is_still(lock_file, folder / "lock"):
            raise SessionError(busy)
        try:
            yield SavedConversation(folder)
        finally:
            _leave(folder)


def _leave(folder: Path) -> None:
    """Remove the folder of a conversation in which nothing was said. Its lock must be held."""
    with suppress(OSError):
        if nothing_said(folder):
            (folder / "lock").unlink()
            folder.rmdir()

"""What can be typed while chatting: messages, and commands that begin with a slash."""

import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress

from olmo3_mlx.cli.generate import ended, statistics
from olmo3_mlx.cli.interrupt import PrefillProgress, Terminated, interruptible
from olmo3_mlx.cli.nearest import did_you_mean
from olmo3_mlx.cli.wording import worded
from olmo3_mlx.conversation.chat import Chat
from olmo3_mlx.conversation.completion import Completion
from olmo3_mlx.conversation.saved import SavedConversation
from olmo3_mlx.errors import CachesNotSavedError, MemoryFitError, PromptError, SessionError, TemplateError
from olmo3_mlx.text.client_messages import Message

HELP = """\
/retry          answer the last message anew
/edit TEXT      say this instead of the last message
/undo           take the last message and its answer back
/history        what was said
/reset          forget the conversation
/system [TEXT]  show the system message, or start anew with this one
/stats          how the last answer went, and what the conversation holds
/help           this
/exit           leave (Ctrl-D too); Ctrl-C ends an answer"""


class Conversation:
    """A chat, kept in `saved` if it has a name; what one line of input does to it."""

    def __init__(self, chat: Chat, saved: SavedConversation | None) -> None:
        self.chat = chat
        self.open = True
        self.last: Completion | None = None
        self._saved = saved
        self._told = False  # that saving failed: once is enough

    def take(self, line: str) -> bool | None:
        """Run a command, or send a message and print the answer. Whether that could be done; None for what
        cannot fail.
        """
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], bool | None]] = {
            "/exit": self._exit,
            "/quit": self._exit,
            "/help": lambda _: print(HELP),
            "/retry": lambda _: self._say(None),
            "/edit": lambda text: self._say(text, instead=True),
            "/undo": self._undo,
            "/history": self._history,
            "/reset": lambda _: self._start_anew(),
            "/system": self._system,
            "/stats": self._stats,
        }
        if not line:
            return None
        if not re.fullmatch(r"/\w*", word):  # /etc/hosts is no command
            return self._say(line)
        if word in commands:
            return commands[word](rest.strip())
        print(f"unknown command {word}: /help lists them{did_you_mean(word, commands)}", file=sys.stderr)
        return False

    def _say(self, text: str | None, instead: bool = False) -> bool:
        """Send a text, or that `instead` of the last one, or, without a text, the last one again.

        What is said is kept before anything else is done, also where nobody reads it any more.
        """
        said: list[Completion] = []
        earlier = list(self.chat.messages)
        try:
            return self._said(text, instead, said)
        except Terminated:
            if not said or said[-1].finish_reason is None:
                # Nobody asked for half an answer instead of a whole one, or for a question to be forgotten.
                if text is None or instead:
                    self._kept(earlier)
                elif not said:
                    self._kept([*earlier, {"role": "user", "content": text}])
            raise

    def _said(self, text: str | None, instead: bool, said: list[Completion]) -> bool:
        with interruptible() as interrupted:
            try:
                self._answer(text, instead, interrupted, said)
            except (PromptError, TemplateError, MemoryFitError) as error:
                print(f"error: {worded(error)} (/help lists what can be done)", file=sys.stderr)
                return False
            except KeyboardInterrupt:
                pass
            except (OSError, RuntimeError, MemoryError):
                with suppress(RuntimeError, MemoryError):  # MLX's, which failed already
                    self._kept()
                raise
            not_kept = self._kept()
            print(flush=True)
            if said:
                self.last = ended(said)
            if not said or said[-1].finish_reason is None:
                print("(stopped)", file=sys.stderr)
            self._tell(not_kept)
        return True

    def _answer(
        self, text: str | None, instead: bool, interrupted: Callable[[], bool], said: list[Completion]
    ) -> None:
        """Print an answer, and put its pieces into `said` as they come."""
        progress = PrefillProgress(interrupted)
        if text is None:
            pieces: Generator[Completion] = self.chat.retry(progress=progress)
        else:
            pieces = (self.chat.edit if instead else self.chat.send)(text, progress=progress)
        with closing(pieces):
            for piece in pieces:
                said.append(piece)
                print(piece.text, end="", flush=True)
                if interrupted():
                    break

    def _kept(self, messages: Sequence[Message] | None = None) -> str:
        """Save the conversation, or these messages of it, if it has a name; why that failed, if it did."""
        if self._saved is None:
            return ""
        try:
            with interruptible():  # Ctrl-C waits until it is on the disk
                self._saved.save(self.chat.messages if messages is None else messages, self.chat.session)
            self._told = False
            return ""
        except SessionError as error:
            what = "what was said"
            if isinstance(error, CachesNotSavedError):
                what = "what the caches hold, which a restart will have to read again"
            return f"(not saved is {what}: {worded(error)}; the chat goes on)"

    def _tell(self, not_kept: str) -> None:
        """Say once why saving failed."""
        if not_kept and not self._told:
            print(not_kept, file=sys.stderr)
        self._told = self._told or bool(not_kept)

    def _exit(self, _: str) -> None:
        self.open = False

    def _undo(self, _: str) -> bool:
        try:
            self.chat.undo()
        except PromptError as error:
            print(f"error: {worded(error)}", file=sys.stderr)
            return False
        self.last = None
        print("(taken back)", file=sys.stderr)
        self._tell(self._kept())
        return True

    def _history(self, _: str) -> None:
        if not self.chat.messages:
            print("(nothing was said yet)", file=sys.stderr)
        for message in self.chat.messages:
            print(f"{message['role']}: {message.get('content', '(calls tools)')}")

    def _start_anew(self, system: str | None = None) -> None:
        self.chat.reset(system)
        self.last = None
        print("(a new conversation)", file=sys.stderr)
        self._tell(self._kept())

    def _system(self, text: str) -> None:
        if text:
            self._start_anew(text)
        else:
            print(self.chat.system if self.chat.system is not None else "(the template's own)")

    def _stats(self, _: str) -> None:
        if self.last is not None:
            print(statistics(self.last))
        session = self.chat.session
        print(
            f"conversation: {len(self.chat.messages)} messages, {self.chat.tokens} of {session.context} "
            f"tokens, caches: {session.nbytes / 1e9:.3f} GB, "
            f"snapshots: {session.snapshot_bytes / 1e9:.3f} GB"
        )

"""olmo3 chat: a conversation."""

import argparse
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.cli.generate import ended, statistics
from olmo3_mlx.cli.interrupt import PrefillProgress, interruptible
from olmo3_mlx.cli.options import add_answering, add_memory, add_model, answer_options, cache_options
from olmo3_mlx.cli.wording import worded
from olmo3_mlx.conversation.chat import Chat
from olmo3_mlx.conversation.completion import Completion
from olmo3_mlx.conversation.saved import SavedConversation, open_conversation
from olmo3_mlx.errors import (
    CachesNotSavedError,
    MemoryFitError,
    OptionError,
    PromptError,
    SessionError,
    TemplateError,
)
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.client_messages import Message

_HELP = """\
/retry          answer the last message anew
/edit TEXT      say this instead of the last message
/undo           take the last message and its answer back
/history        what was said
/reset          forget the conversation
/system [TEXT]  show the system message, or start anew with this one
/stats          how the last answer went, and what the conversation holds
/help           this
/exit           leave (Ctrl-D too); Ctrl-C ends an answer"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "chat",
        help="hold a conversation",
        description="Hold a conversation. Only what is new is run on each turn, also after a message was "
        "edited or taken back.",
        epilog=f"While chatting:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "--session",
        metavar="NAME",
        help="keep the conversation under this name, and go on with it if it is there; conversations lie in "
        "the folder that OLMO3_SESSIONS names, or in olmo3-mlx/sessions of your data folder",
    )
    add_answering(parser)
    add_memory(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends; returns the exit code."""
    options = answer_options(args)
    with ExitStack() as stack:
        saved = stack.enter_context(open_conversation(args.session)) if args.session is not None else None
        if saved and saved.messages and args.system is not None:
            raise OptionError(
                f"the session {args.session} has a beginning: leave --system out, or use /system"
            )
        checkpoint = Checkpoint.open(args.model, args.revision)
        plan = checkpoint.plan(cache_options(args), context=args.context)
        tokenizer, model = checkpoint.tokenizer, checkpoint.load()
        session = Session.within(model, plan, files=saved.files(model, plan.options) if saved else None)
        messages = saved.messages if saved else None
        chat = Chat(model, tokenizer, system=args.system, messages=messages, session=session, **options)
        print(f"{args.model}: type a message, /help for commands, Ctrl-D to leave", file=sys.stderr)
        resumed = _resumed(session, saved.messages) if saved else ""
        if messages:
            print(resumed, file=sys.stderr)
        _read_lines(_Conversation(chat, saved))
    return 0


def _read_lines(conversation: "_Conversation") -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415  (gives input() line editing and history)
    while conversation.open:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            conversation.take(line.strip())
        except EOFError:
            if sys.stdin.isatty():
                print()
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 text: {error}") from None


def _resumed(session: Session, messages: Sequence[Message]) -> str:
    """Take up what a session held, after so many messages; says what that is."""
    said = f"(going on after {len(messages)} messages"
    try:
        session.resume()
    except SessionError as error:
        return f"{said}, which are read again: {worded(error)})"
    return f"{said}, {len(session.tokens)} tokens of which are held)"


class _Conversation:
    """What one line of input does."""

    def __init__(self, chat: Chat, saved: SavedConversation | None) -> None:
        self.chat = chat
        self.open = True
        self.last: Completion | None = None
        self._saved = saved
        self._told = False  # that saving failed: once is enough

    def take(self, line: str) -> None:
        """Run a command, or send a message and print the answer."""
        word, _, rest = line.partition(" ")
        commands = {
            "/exit": self._exit,
            "/quit": self._exit,
            "/help": lambda _: print(_HELP),
            "/retry": lambda _: self._say(None),
            "/edit": lambda text: self._say(text, instead=True),
            "/undo": self._undo,
            "/history": self._history,
            "/reset": lambda _: self._start_anew(),
            "/system": self._system,
            "/stats": self._stats,
        }
        if not line:
            return
        if not line.startswith("/"):
            self._say(line)
        elif word in commands:
            commands[word](rest.strip())
        else:
            print(f"unknown command {word}: /help lists them", file=sys.stderr)

    def _say(self, text: str | None, instead: bool = False) -> None:
        """Send a text, or that `instead` of the last one, or, without a text, the last one again."""
        said: list[Completion] = []
        try:
            with interruptible() as interrupted:
                progress = PrefillProgress(interrupted)
                if text is None:
                    pieces: Generator[Completion] = self.chat.retry(progress=progress)
                else:
                    pieces = (self.chat.edit if instead else self.chat.send)(text, progress=progress)
                with closing(pieces):
                    for piece in pieces:
                        print(piece.text, end="", flush=True)
                        said.append(piece)
                        if interrupted():
                            break
        except (PromptError, TemplateError, MemoryFitError) as error:
            print(f"error: {worded(error)} (/help lists what can be done)", file=sys.stderr)
            return
        except KeyboardInterrupt:
            pass
        print()
        if said:
            self.last = ended(said)
        if not said or said[-1].finish_reason is None:
            print("(stopped)", file=sys.stderr)
        self._keep()

    def _keep(self) -> None:
        """Save the conversation, if it has a name."""
        if self._saved is None:
            return
        try:
            with interruptible():  # Ctrl-C waits until it is on the disk
                self._saved.save(self.chat.messages, self.chat.session)
            self._told = False
        except SessionError as error:
            what = "what was said"
            if isinstance(error, CachesNotSavedError):
                what = "what the caches hold, which a restart will have to read again"
            if not self._told:
                print(f"(not saved is {what}: {worded(error)}; the chat goes on)", file=sys.stderr)
            self._told = True

    def _exit(self, _: str) -> None:
        self.open = False

    def _undo(self, _: str) -> None:
        try:
            self.chat.undo()
        except PromptError as error:
            print(f"error: {worded(error)}", file=sys.stderr)
            return
        self.last = None
        print("(taken back)", file=sys.stderr)
        self._keep()

    def _history(self, _: str) -> None:
        for message in self.chat.messages:
            print(f"{message['role']}: {message['content']}")

    def _start_anew(self, system: str | None = None) -> None:
        self.chat.reset(system)
        self.last = None
        print("(a new conversation)", file=sys.stderr)
        self._keep()

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

"""olmo3 chat: a conversation."""

import argparse
import sys
from contextlib import closing

from olmo3_mlx.chat import Chat
from olmo3_mlx.checkpoint import load
from olmo3_mlx.cli.generate import ended, statistics
from olmo3_mlx.cli.interrupt import PrefillProgress, interruptible
from olmo3_mlx.cli.options import add_answering, add_model, answering
from olmo3_mlx.completion import Completion
from olmo3_mlx.errors import PromptError, TemplateError

_HELP = """\
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
        description="Hold a conversation. Only what is new is run on each turn.",
        epilog=f"While chatting:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_answering(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends; returns the exit code."""
    options = answering(args)
    model, tokenizer = load(args.model, revision=args.revision)
    session = _Session(Chat(model, tokenizer, system=args.system, **options))
    print(f"{args.model}: type a message, /help for commands, Ctrl-D to leave", file=sys.stderr)
    if sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415  (gives input() line editing and history)
    while session.open:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 text: {error}") from None
        session.take(line.strip())
    return 0


class _Session:
    """What one line of input does."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.open = True
        self.last: Completion | None = None

    def take(self, line: str) -> None:
        """Run a command, or send a message and print the answer."""
        word, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/"):
            self._say(line)
        elif word in ("/exit", "/quit"):
            self.open = False
        elif word == "/help":
            print(_HELP)
        elif word == "/reset":
            self._start_anew()
        elif word == "/system":
            self._system(rest.strip())
        elif word == "/stats":
            self._stats()
        else:
            print(f"unknown command {word}: /help lists them", file=sys.stderr)

    def _say(self, text: str) -> None:
        said: list[Completion] = []
        try:
            with (
                interruptible() as interrupted,
                closing(self.chat.send(text, progress=PrefillProgress(interrupted))) as pieces,
            ):
                for piece in pieces:
                    print(piece.text, end="", flush=True)
                    said.append(piece)
                    if interrupted():
                        break
        except (PromptError, TemplateError) as error:
            print(f"error: {error} (/reset starts a new conversation)", file=sys.stderr)
            return
        except KeyboardInterrupt:
            pass
        print()
        if said:
            self.last = ended(said)
        if not said or said[-1].finish_reason is None:
            print("(stopped)", file=sys.stderr)

    def _start_anew(self, system: str | None = None) -> None:
        self.chat.reset(system)
        self.last = None
        print("(a new conversation)", file=sys.stderr)

    def _system(self, text: str) -> None:
        if text:
            self._start_anew(text)
        else:
            print(self.chat.system if self.chat.system is not None else "(the template's own)")

    def _stats(self) -> None:
        if self.last is not None:
            print(statistics(self.last))
        context = self.chat.model.config.max_position_embeddings
        print(
            f"conversation: {len(self.chat.messages)} messages, {self.chat.tokens} of {context} tokens,"
            f" caches: {self.chat.cache_bytes / 1e9:.3f} GB"
        )

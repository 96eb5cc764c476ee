"""olmo3 chat: a conversation."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.cli.chat_commands import HELP, Conversation
from olmo3_mlx.cli.options import add_answering, add_memory, add_model, answer_options, cache_options
from olmo3_mlx.cli.wording import worded
from olmo3_mlx.conversation.chat import Chat
from olmo3_mlx.conversation.saved import SavedConversation, open_conversation
from olmo3_mlx.errors import OptionError, OtherCachesError, PromptError, SessionError
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.client_messages import Message

_SHOWN_LINES, _SHOWN_LETTERS = 5, 600  # of a question or an answer, when a conversation goes on


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb's command line."""
    parser = verbs.add_parser(
        "chat",
        help="hold a conversation",
        description="Hold a conversation. Only what is new is run on each turn, also after a message was\n"
        "edited or taken back. Where standard input is no terminal, each of its lines is a\n"
        "message or a command, and the exit code is 1 if none of them could be done.",
        epilog=f"While chatting:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, positional=True)
    parser.add_argument(
        "--session",
        metavar="NAME",
        help="keep the conversation under this name, and go on with it if it is there; conversations lie in "
        "the folder that OLMO3_SESSIONS names, or in olmo3-mlx/sessions of your data folder "
        "(`olmo3 sessions` lists them)",
    )
    add_answering(parser)
    add_memory(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends; returns the exit code, 1 if nothing of a batch of lines could be done."""
    options, caches = answer_options(args), cache_options(args)
    with ExitStack() as stack:
        saved = stack.enter_context(open_conversation(args.session)) if args.session is not None else None
        if saved and saved.messages and args.system is not None:
            raise OptionError(
                f"the session {args.session} has a beginning: leave --system out, or use /system"
            )
        checkpoint = Checkpoint.open(args.model, args.revision)
        plan = checkpoint.plan(caches, context=args.context)
        tokenizer, model = checkpoint.tokenizer, checkpoint.load()
        session = Session.within(model, plan, files=saved.files(model, plan.options) if saved else None)
        messages = saved.messages if saved else None
        chat = Chat(model, tokenizer, system=args.system, messages=messages, session=session, **options)
        print(f"{args.model}: type a message, /help for commands, Ctrl-D to leave", file=sys.stderr)
        if saved:
            resumed, saved.model = _resumed(session, saved, args.model), args.model
            if saved.messages:
                print(resumed, *last_turn(saved.messages), sep="\n", file=sys.stderr)
        return _read_lines(Conversation(chat, saved))


def _read_lines(conversation: Conversation) -> int:
    """Take line after line; the exit code."""
    done: list[bool] = []
    if sys.stdin.isatty():
        import readline  # noqa: F401, PLC0415  (gives input() line editing and history)
    while conversation.open:
        try:
            line = _line()
            outcome = conversation.take(line.strip())
            done += [] if outcome is None else [outcome]
        except EOFError:
            if sys.stdin.isatty():
                print()
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not UTF-8 text: {error}") from None
    return 1 if done and not any(done) and not sys.stdin.isatty() else 0


def _line() -> str:
    """The next line of standard input. Raises EOFError at its end."""
    if sys.stdin.isatty():
        return input("> ")
    line = sys.stdin.readline()  # `input` would need standard output, which may be full
    if not line:
        raise EOFError
    return line


def _resumed(session: Session, saved: SavedConversation, model: str) -> str:
    """Take up what a session held; says what that is, and if it is of no use to this `model`, why."""
    said = f"(going on after {len(saved.messages)} messages"
    try:
        session.resume()
    except SessionError as error:
        other = isinstance(error, OtherCachesError) and "model" in error.differing
        held_with = f", {saved.model}" if other and saved.model not in (None, model) else ""
        return f"{said}, which are read again: {worded(error)}{held_with})"
    held = len(session.tokens)
    return f"{said}, {held} tokens of which are held)" if held else f"{said}, which are read again)"


def last_turn(messages: Sequence[Message]) -> list[str]:
    """The last question, and the end of its answer, as the chat shows them: a few lines."""
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if asked is None:
        return []
    question = messages[asked].get("content", "").strip()
    shown = question[:_SHOWN_LETTERS].splitlines()[:_SHOWN_LINES]
    lines = [f"> {shown[0] if shown else ''}", *shown[1:]]
    if len("\n".join(shown)) < len(question):
        lines[-1] += " ..."
    for message in messages[asked + 1 :]:
        answer = message.get("content", "").rpartition("</think>")[2].strip()
        shown = answer[-_SHOWN_LETTERS:].splitlines()[-_SHOWN_LINES:]
        if shown and len("\n".join(shown)) < len(answer):
            shown[0] = f"... {shown[0]}"
        lines += shown
    if asked == len(messages) - 1:
        lines.append("(it has no answer yet: /retry answers it)")
    return lines

"""The command line: `olmo3 VERB ...`, one file a verb. Results go to stdout, all else to stderr.

Exit codes: 0 done, 1 it failed and one line says why, 2 wrong usage, 130 interrupted, 143 and 129 ended by
SIGTERM and SIGHUP.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from olmo3_mlx import __version__
from olmo3_mlx.cli import chat, compare, convert, doctor, generate, inspect, revisions, sessions
from olmo3_mlx.cli.interrupt import Terminated
from olmo3_mlx.cli.nearest import model_meant
from olmo3_mlx.cli.parser import Parser
from olmo3_mlx.cli.wording import worded
from olmo3_mlx.errors import Olmo3Error, OptionError
from olmo3_mlx.memory.machine import memory_ran_out

_VERBS = (generate, chat, convert, compare, inspect, revisions, sessions, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    _replace_closed_streams()
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except Olmo3Error as error:
        print(f"olmo3 {args.verb}: error: {worded(error)}{model_meant(error, args)}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except (KeyboardInterrupt, Terminated) as stop:
        return _stopped(args.verb, stop)
    except BrokenPipeError:  # the reader has gone, as in `olmo3 generate ... | head`
        _discard_output()
        return 0
    except (MemoryError, RuntimeError) as error:  # MLX raises RuntimeError for whatever fails in it
        line = " ".join(str(error).split()) or "out of memory"
        hint = " (`olmo3 inspect` shows what fits this machine)" if memory_ran_out(error) else ""
        print(f"olmo3 {args.verb}: error: {line}{hint}", file=sys.stderr)
        return 1
    except OSError as error:  # standard output on a full disk, say
        print(f"olmo3 {args.verb}: error: {error}", file=sys.stderr)
        _discard_output()
        return 1


def _replace_closed_streams() -> None:
    """Whoever started us may have closed them; then the next file opened would pass for one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _stopped(verb: str, stop: KeyboardInterrupt | Terminated) -> int:
    """Say by what, if there is a terminal left to say it on; the exit code that shells know."""
    if isinstance(stop, Terminated):
        signum, said = stop.signal, f"ended by {stop.signal.name}"
    else:
        signum, said = signal.SIGINT, "interrupted"
    try:
        print(f"olmo3 {verb}: {': '.join((said, *stop.args))}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:
        _discard_output()
    return 128 + signum


def _discard_output() -> None:
    """Let what standard output still holds go nowhere, so that the exit does not fail on it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="olmo3",
        description="Chat with Ai2's Olmo 3 models, convert their checkpoints and look inside them.",
        epilog="`olmo3 VERB --help` explains a verb. The model is the embedded demo unless --model or "
        "the variable OLMO3_MODEL names another.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"olmo3 {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser

"""Text on standard input: a prompt, or what is added to one."""

import os
import select
import stat
import sys

from olmo3_mlx.errors import PromptError

_PATIENCE = 5  # seconds


def read_text() -> str:
    """All of standard input, less a byte order mark and the newline at its end. Raises PromptError for what
    is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 text: {error}") from None
    return text.removesuffix("\n").removesuffix("\r")  # the one that echo and editors put there


def added_text() -> str:
    """What was piped in beside a prompt; empty where standard input is neither a pipe nor a file.

    A terminal, /dev/null, a socket (as `ssh` gives) or a closed stream may never end, or was not meant. A
    pipe that stays silent is waited for, as something slow may be at its other end; then we say so.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or no file of the system's
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    if not select.select([sys.stdin], [], [], _PATIENCE)[0]:
        print("waiting for standard input (`< /dev/null` leaves it out)", file=sys.stderr)
    return read_text()

"""Text that is piped in beside a prompt, and standard inputs that are none of ours."""

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from command_line import ANSWER, SUM, Run, asks_a_parrot, assert_one_line, facts, finish, read_until, start

from olmo3_mlx.cli.standard_input import added_text

pytestmark = pytest.mark.usefixtures("a_users_shell")


@contextmanager
def pipe(data: bytes) -> Iterator[IO[bytes]]:
    """The reading end of a pipe that holds some bytes and is closed behind them."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as end:
        end.write(data)
    with os.fdopen(reading, "rb") as stream:
        yield stream


def prompt_of(olmo3: Run, *arguments: object, stdin: str = "") -> int:
    """How many tokens a prompt has that is given in one of the ways that were there before."""
    done = olmo3("generate", *arguments, "--json", "--max-tokens", 1, stdin=stdin)
    count = facts(done)["prompt_tokens"]
    assert isinstance(count, int)
    return count


def asked(*arguments: object, stdin: Any) -> dict[str, Any]:
    return facts(finish(start("generate", *arguments, "--json", "--max-tokens", 1, stdin=stdin)))


@asks_a_parrot
def test_piped_text_is_added_to_a_given_prompt_behind_a_blank_line(olmo3: Run, tmp_path: Path) -> None:
    together = prompt_of(olmo3, "Translate:\n\nHello, world.\nHow are you?", "--raw")
    text = "Hello, world.\nHow are you?\n".encode("utf-8-sig")
    with pipe(text) as stdin:
        assert asked("Translate:", "--raw", stdin=stdin)["prompt_tokens"] == together
    (tmp_path / "text").write_bytes(text)
    with (tmp_path / "text").open() as stdin:
        assert asked("Translate:", "--raw", stdin=stdin)["prompt_tokens"] == together
    alone = prompt_of(olmo3, "Translate:", "--raw")
    assert alone < together - 5
    with pipe(b" \n\n") as stdin:
        assert asked("Translate:", "--raw", stdin=stdin)["prompt_tokens"] == alone


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a file the standard input, as a text stream."""

    def put(descriptor: int) -> None:
        monkeypatch.setattr(sys, "stdin", os.fdopen(descriptor, encoding="utf-8", closefd=False))

    return put


def test_what_is_neither_a_pipe_nor_a_file_is_not_read(
    standard_input: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these would be waited for without end, but for the last three."""
    screen, terminal = pty.openpty()
    one, other = socket.socketpair()
    with Path(os.devnull).open() as nothing:
        for descriptor in (terminal, one.fileno(), nothing.fileno()):
            standard_input(descriptor)
            assert added_text() == ""
    os.close(screen)
    os.close(terminal)
    one.close()
    other.close()
    with pipe(b"") as empty:
        standard_input(empty.fileno())
        assert added_text() == ""
    with pipe(b"there\n") as full:
        standard_input(full.fileno())
        assert added_text() == "there"
        sys.stdin.close()
        assert added_text() == ""


@asks_a_parrot
def test_a_closed_standard_input_adds_nothing() -> None:
    command = [str(Path(sys.executable).with_name("olmo3")), "generate", SUM, "--temperature", "0"]
    shell = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(shell, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.decode()) == (0, f"{ANSWER}\n")
    assert b"prompt: 57 tokens" in done.stderr


@asks_a_parrot
def test_a_pipe_that_stays_silent_is_waited_for_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; import olmo3_mlx.cli.standard_input as given; given._PATIENCE = 0.01\n"
        "from olmo3_mlx.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", "Sum up:", "--temperature", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        said = read_until(process.stderr.fileno(), rb"\n")
        assert said == b"waiting for standard input (`< /dev/null` leaves it out)\n"
        done = finish(process, b"17 + 25\n")
    assert (done.code, done.out) == (0, f"{ANSWER}\n")


@asks_a_parrot
def test_piped_bytes_that_are_no_text_are_not_dropped_silently() -> None:
    with pipe(b"caf\xe9") as stdin:
        done = finish(start("generate", SUM, stdin=stdin))
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "generate")
    assert "UTF-8" in done.err

"""Standard streams that are closed, full, gone, or no text: no traceback, and nothing lost."""

import os
import subprocess
from pathlib import Path

import pytest
from command_line import (
    ANSWER,
    FAR_TOO_LONG,
    GREETING,
    OLMO3,
    SUM,
    Run,
    asks_a_parrot,
    assert_one_line,
    finish,
    start,
)

pytestmark = pytest.mark.usefixtures("a_users_shell")


def test_an_answer_survives_a_screen_that_only_knows_ascii() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = finish(start("inspect", "--model", "7b", env=environment))
    assert (done.code, done.err) == (0, "")
    assert "YaRN ? 8 from 8,192 ? 500,000" in done.out


def test_a_reader_that_leaves_early_ends_the_answer_quietly() -> None:
    arguments = ("generate", "Once upon a time", "--raw", "--temperature", 0, "--max-tokens", 2000)
    process = start(*arguments, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stderr is not None
    assert len(os.read(process.stdout.fileno(), 1)) == 1
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(timeout=FAR_TOO_LONG), err) == (0, b"")


def test_a_reader_that_never_was_ends_inspect_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = finish(start("inspect", stdout=writing))
    os.close(writing)
    assert (done.code, done.err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@asks_a_parrot
@pytest.mark.parametrize("arguments", [["inspect"], ["generate", SUM, "--temperature", "0"]])
def test_output_to_a_full_disk_fails_in_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = finish(start(*arguments, stdout=full))
    assert done.code == 1
    assert_one_line(done.err, arguments[0])
    assert "No space left on device" in done.err


def test_a_closed_stdout_is_no_traceback() -> None:
    command = 'exec "$0" inspect --json >&-'
    done = subprocess.run(
        ["/bin/sh", "-c", command, OLMO3], capture_output=True, check=False, timeout=FAR_TOO_LONG
    )
    assert b"Traceback" not in done.stderr


@asks_a_parrot
@pytest.mark.parametrize("closed", ["<&-", "2>&-"])
def test_closed_standard_streams_do_not_change_what_is_printed(closed: str) -> None:
    command = f'exec "$0" generate "What is 17 + 25?" --temperature 0 {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, OLMO3], capture_output=True, check=False, timeout=FAR_TOO_LONG
    )
    assert (done.returncode, done.stdout.decode()) == (0, f"{ANSWER}\n")


def test_a_chat_whose_input_is_closed_ends_at_once() -> None:
    """The weights were opened as file 0 and then taken for standard input."""
    command = 'exec "$0" chat --model demo <&-'
    done = subprocess.run(
        ["/bin/sh", "-c", command, OLMO3], capture_output=True, check=False, timeout=FAR_TOO_LONG
    )
    assert (done.returncode, done.stdout) == (0, b"")


@asks_a_parrot
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_standard_input_that_is_no_text_gets_one_line(olmo3: Run, verb: str) -> None:
    done = olmo3(verb, stdin=b"caf\xe9\n")
    assert (done.code, done.out) == (1, "")
    error = done.err.removeprefix(GREETING)
    assert_one_line(error, verb)
    assert "UTF-8" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_was_said_is_kept_though_standard_output_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [OLMO3, "chat", "--session", "work", "--temperature", "0"],
            input="My name is Ada.\n", stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "My name is Ada." in (tmp_path / "work" / "conversation.json").read_text()

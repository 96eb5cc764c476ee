"""SIGTERM and SIGHUP: what was said is kept, and the exit code says what ended the program."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ANSWER, FAR_TOO_LONG, asks_a_parrot, finish, read_until, start

from olmo3_mlx import CacheOptions, Chat, Session, load, open_conversation
from olmo3_mlx.cli.chat_commands import Conversation
from olmo3_mlx.cli.interrupt import Terminated, interruptible

pytestmark = pytest.mark.usefixtures("a_users_shell")

ENDING = [(signal.SIGTERM, 143), (signal.SIGHUP, 129)]
LONG_ANSWER = ("generate", "Once upon a time", "--raw", "--temperature", 0, "--max-tokens", 3000)


@pytest.mark.parametrize(("signum", "code"), ENDING)
def test_an_answer_that_is_ended_prints_what_it_has(
    long_checkpoint: Path, signum: signal.Signals, code: int
) -> None:
    process = start(*LONG_ANSWER, "--model", long_checkpoint, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    read_until(process.stdout.fileno(), rb"..........")
    process.send_signal(signum)
    done = finish(process)
    assert done.code == code
    statistics, last = done.err.splitlines()
    assert statistics.endswith("finish: interrupted")
    assert last == f"olmo3 generate: ended by {signum.name}"
    assert done.out.endswith("\n")


def test_an_answer_that_is_ended_is_whole_json(long_checkpoint: Path) -> None:
    """Nothing is printed before the end: so the signal is raised in the middle."""
    code = (
        "import os, signal, sys\n"
        "import olmo3_mlx.cli.generate as verb\n"
        "from olmo3_mlx.cli import main\n"
        "stream = verb.stream\n"
        "def ended(*arguments, **options):\n"
        "    for count, piece in enumerate(stream(*arguments, **options), start=1):\n"
        "        if count == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "        yield piece\n"
        "verb.stream = ended\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, LONG_ANSWER), "--json", "--model", str(long_checkpoint)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=FAR_TOO_LONG, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr) == (143, "olmo3 generate: ended by SIGTERM\n")
    answer = json.loads(done.stdout)
    assert (answer["finish_reason"], answer["generation_tokens"]) == ("interrupted", 4)


@pytest.mark.parametrize(("signum", "code"), ENDING)
def test_a_chat_that_is_ended_in_the_middle_of_an_answer_keeps_what_was_said(
    long_checkpoint: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    process = start(
        *("chat", "--temperature", 0, "--model", long_checkpoint, "--session", "work"),
        env={**os.environ, "OLMO3_SESSIONS": str(tmp_path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    seen = read_until(process.stdout.fileno(), rb"..........")
    process.send_signal(signum)
    done = finish(process)
    assert done.code == code
    assert done.err.endswith(f"(stopped)\nolmo3 chat: ended by {signum.name}\n")
    question, answer = json.loads((tmp_path / "work" / "conversation.json").read_text())["messages"]
    assert question == {"role": "user", "content": "hello"}
    assert answer["content"] == (seen.decode() + done.out).removesuffix("\n")
    again = finish(
        start(
            *("chat", "--model", long_checkpoint, "--session", "work"),
            env={**os.environ, "OLMO3_SESSIONS": str(tmp_path)},
        )
    )
    assert re.search(r"going on after 2 messages, \d+ tokens of which are held", again.err)


def test_a_terminal_that_is_closed_in_the_middle_of_an_answer_loses_nothing(
    long_checkpoint: Path, tmp_path: Path
) -> None:
    """The system sends SIGHUP then, and nothing can be printed any more."""
    child, screen = pty.fork()
    if child == 0:
        os.environ["OLMO3_SESSIONS"] = str(tmp_path)
        olmo3 = str(Path(sys.executable).with_name("olmo3"))
        os.execv(olmo3, [olmo3, "chat", "--model", str(long_checkpoint), "--session", "work"])
    read_until(screen, rb"> ")
    os.write(screen, b"hello\n")
    read_until(screen, rb"hello\r\n(.|\n){20}")
    os.close(screen)
    until = time.monotonic() + FAR_TOO_LONG
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(found[1]) == 129
    messages = json.loads((tmp_path / "work" / "conversation.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert len(messages[1]["content"]) > 10


def test_a_reader_that_leaves_in_the_middle_of_an_answer_loses_nothing(
    long_checkpoint: Path, tmp_path: Path
) -> None:
    process = start(
        *("chat", "--model", long_checkpoint, "--session", "work"),
        env={**os.environ, "OLMO3_SESSIONS": str(tmp_path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert len(os.read(process.stdout.fileno(), 1)) == 1
    process.stdout.close()
    assert process.wait(timeout=FAR_TOO_LONG) == 0
    messages = json.loads((tmp_path / "work" / "conversation.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


@asks_a_parrot
def test_a_screen_that_takes_the_answer_and_not_its_last_newline_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if text == "\n":
                raise OSError(5, "Input/output error")
            return super().write(text)

    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path))
    model, tokenizer = load("parrot")
    with open_conversation("work") as saved:
        session = Session(model, files=saved.files(model, CacheOptions()))
        chat = Conversation(Chat(model, tokenizer, session=session, temperature=0), saved)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(sys, "stdout", Gone())
            chat.take("hello")
    with open_conversation("work") as saved:
        assert saved.messages[1]["content"] == ANSWER


def test_signals_set_a_flag_and_end_the_program_only_behind_what_must_be_done() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    steps = []
    with pytest.raises(Terminated) as ended, interruptible() as outer:
        try:
            with interruptible() as inner:
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGTERM)  # a shutdown asks more than once
                steps += [inner(), outer()]
        finally:
            steps.append(outer())
    assert (steps, ended.value.signal) == ([True, False, False], signal.SIGHUP)
    assert {each: signal.getsignal(each) for each in before} == before


def test_signals_that_are_ignored_stay_so() -> None:
    """As `nohup` has it, and a shell that puts a command into the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

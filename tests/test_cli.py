"""The command line: whole outputs, exit codes, Ctrl-C, and one line for whatever goes wrong."""

import contextlib
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, random_model, save_checkpoint
from fake_hub import FakeHub

import convert
import olmo3_mlx
from olmo3_mlx import Tokenizer, load
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.cli import main
from olmo3_mlx.conversation.completion import Completion
from olmo3_mlx.conversation.saved import open_conversation

OLMO3 = str(Path(sys.executable).with_name("olmo3"))
SUM = "What is 17 + 25?"
FAR_TOO_LONG = 300  # seconds to wait for a process, on however busy a machine
JSON_KEYS = [
    "text", "token_ids", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps",
    "peak_memory", "finish_reason", "model",
]  # fmt: skip
LONG: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": 8192,
    "max_position_embeddings": 100_000,
    "eos_token_id": None,
}


class Done(NamedTuple):
    """How a command went."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def without_a_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLMO3_MODEL", raising=False)


@pytest.fixture
def olmo3(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command in this process, with `stdin` piped in."""

    def run(*arguments: object, stdin: str | bytes = "") -> Done:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as usage:  # argparse
            code = int(usage.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def ctrl_c_works() -> Iterator[None]:
    """Whoever runs the tests in the background has Ctrl-C ignored, which a command would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


STARTED: "list[subprocess.Popen[bytes]]" = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        with STARTED.pop() as process:  # closes its pipes
            process.kill()


def start(*arguments: object, **options: Any) -> "subprocess.Popen[bytes]":
    """Start one command as a user does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([OLMO3, *map(str, arguments)], **{**pipes, **options})
    STARTED.append(process)
    return process


def finish(process: "subprocess.Popen[bytes]", stdin: bytes = b"") -> Done:
    """Give a command the rest of its input, and wait for it to end."""
    out, err = process.communicate(stdin, timeout=FAR_TOO_LONG)
    return Done(process.returncode, *((b or b"").decode(errors="replace") for b in (out, err)))


def read_until(descriptor: int, pattern: bytes) -> bytes:
    """Read what a process writes until a pattern is there."""
    seen = b""
    while not re.search(pattern, seen):
        ready, _, _ = select.select([descriptor], [], [], FAR_TOO_LONG)
        piece = os.read(descriptor, 65536) if ready else b""
        assert piece, f"waited for {pattern!r}, got {seen!r}"
        seen += piece
    return seen


def facts(done: Done) -> dict[str, Any]:
    """The one JSON object that a command printed."""
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


def assert_statistics(line: str, *, prompt: int, generated: int, reason: str) -> None:
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"prompt: {prompt} tokens, {number} tokens/s \| generation: {generated} tokens, "
        rf"{number} tokens/s \| peak memory: \d+\.\d\d\d GB \| finish: {reason}",
        line,
    ), line


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and no end token: an answer goes on until somebody stops it."""
    return save_checkpoint(tmp_path_factory.mktemp("long") / "model", LONG, random_model(LONG).tensors())


ANSWER = "Nice to meet you."
PARROT: dict[str, Any] = {
    **LONG,
    "num_attention_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "eos_token_id": [8190, 8188],
}


@pytest.fixture(scope="session")
def parrot_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says ANSWER whatever it is asked, and takes a hundredth of the demo's time for it.

    Its blocks add nothing, and its head names the token that comes after the last one.
    """
    tokenizer = Tokenizer.from_folder(DEMO)
    said = [*tokenizer.encode(ANSWER), 8188]
    tensors = {name: mx.zeros_like(array) for name, array in random_model(PARROT).tensors().items()}
    embedding, head = (np.zeros((8192, PARROT["hidden_size"]), np.float32) for _ in range(2))
    embedding[:, len(said)] = 1  # all that is not said is followed by its beginning
    head[said[0], len(said)] = 9
    for i, (token, following) in enumerate(pairwise(said)):
        embedding[token] = np.eye(PARROT["hidden_size"])[i]
        head[following, i] = 9
    tensors |= {"model.embed_tokens.weight": mx.array(embedding), "lm_head.weight": mx.array(head)}
    tensors["model.norm.weight"] = mx.ones_like(tensors["model.norm.weight"])
    return save_checkpoint(tmp_path_factory.mktemp("models") / "parrot", PARROT, tensors)


@pytest.fixture
def parrot(parrot_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it the default model."""
    monkeypatch.chdir(parrot_checkpoint.parent)
    monkeypatch.setenv("OLMO3_MODEL", "parrot")


asks_a_parrot = pytest.mark.usefixtures("parrot")

# generate


def test_an_answer_goes_to_stdout_and_statistics_to_stderr(olmo3: Run) -> None:
    done = olmo3("generate", SUM, "--temperature", 0)
    assert (done.code, done.out) == (0, "17 + 25 = 42\n")
    (line,) = done.err.splitlines()
    assert_statistics(line, prompt=57, generated=11, reason="stop")


def test_the_installed_command_answers() -> None:
    done = finish(start("generate", SUM, "--temperature", "0"))
    assert (done.code, done.out) == (0, "17 + 25 = 42\n")
    assert_statistics(done.err.rstrip("\n"), prompt=57, generated=11, reason="stop")


@asks_a_parrot
@pytest.mark.parametrize("arguments", [["-"], []], ids=["dash", "no prompt"])
def test_the_prompt_may_come_from_standard_input(olmo3: Run, arguments: list[str]) -> None:
    done = olmo3("generate", *arguments, "--temperature", 0, stdin=SUM)
    assert (done.code, done.out) == (0, f"{ANSWER}\n")
    assert "prompt: 57 tokens" in done.err


@asks_a_parrot
def test_a_given_prompt_leaves_standard_input_alone(olmo3: Run) -> None:
    done = olmo3("generate", SUM, "--temperature", 0, stdin=b"\xff\xfe")
    assert (done.code, done.out) == (0, f"{ANSWER}\n")
    assert "prompt: 57 tokens" in done.err


@asks_a_parrot
def test_json_is_one_object_with_the_documented_keys(olmo3: Run) -> None:
    done = olmo3("generate", SUM, "--temperature", 0, "--json")
    answer = facts(done)
    assert list(answer) == JSON_KEYS
    assert done.err == ""
    assert answer["text"] == ANSWER
    assert (answer["prompt_tokens"], answer["generation_tokens"]) == (57, 6)
    assert len(answer["token_ids"]) == 6
    assert answer["token_ids"][-1] in (8190, 8188)
    assert (answer["finish_reason"], answer["model"]) == ("stop", "parrot")
    assert answer["prompt_tps"] > 0
    assert answer["generation_tps"] > 0
    assert 0 < answer["peak_memory"] < 100


def test_raw_continues_the_prompt_as_it_stands(olmo3: Run, tiny_checkpoint: Path) -> None:
    _, tokenizer = load(tiny_checkpoint)
    plain = facts(
        olmo3("generate", "Once upon", "--raw", "--json", "--max-tokens", 1, "--model", tiny_checkpoint)
    )
    assert plain["prompt_tokens"] == len(tokenizer.encode("Once upon"))


def test_a_system_message_goes_through_the_template(olmo3: Run, tiny_checkpoint: Path) -> None:
    _, tokenizer = load(tiny_checkpoint)
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hello"}]
    for given, expected in ((["--system", "Be terse."], messages), ([], messages[1:])):
        found = facts(
            olmo3("generate", "Hello", *given, "--json", "--max-tokens", 1, "--model", tiny_checkpoint)
        )
        text = tokenizer.apply_chat_template(expected)
        assert found["prompt_tokens"] == len(tokenizer.encode(text))


@asks_a_parrot
@pytest.mark.parametrize(
    ("stops", "expected"),
    [([" you"], "Nice to meet"), (["you", "eet"], "Nice to m"), (["99"], ANSWER), (["Nic"], "")],
    ids=["one", "the earliest of two", "one that does not come", "at once"],
)
def test_an_answer_ends_before_a_stop_string(olmo3: Run, stops: list[str], expected: str) -> None:
    arguments = [argument for stop in stops for argument in ("--stop", stop)]
    done = olmo3("generate", SUM, "--temperature", 0, *arguments)
    assert (done.code, done.out) == (0, expected + "\n")
    assert done.err.endswith("finish: stop\n")


@asks_a_parrot
def test_max_tokens_ends_an_answer(olmo3: Run) -> None:
    answer = facts(olmo3("generate", SUM, "--temperature", 0, "--max-tokens", 3, "--json"))
    assert answer["generation_tokens"] == len(answer["token_ids"]) == 3
    assert answer["finish_reason"] == "length"
    assert answer["text"] == "Nice to meet"


def test_a_seed_makes_sampling_repeatable(olmo3: Run, tiny_checkpoint: Path) -> None:
    def ids(seed: int) -> tuple[int, ...]:
        done = olmo3(
            "generate", "Once", "--raw", "--json", "--max-tokens", 8, "--temperature", 1,
            "--seed", seed, "--model", tiny_checkpoint,
        )  # fmt: skip
        return tuple(facts(done)["token_ids"])

    first = [ids(seed) for seed in (1, 2, 3)]
    assert first == [ids(seed) for seed in (1, 2, 3)]
    assert len(set(first)) == 3


def test_what_is_left_out_comes_from_the_generation_config(olmo3: Run, tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "generation_config.json").write_text('{"max_new_tokens": 2, "do_sample": false}')
    arguments = ("generate", "Once", "--raw", "--json", "--model", tiny_checkpoint)
    assert facts(olmo3(*arguments))["generation_tokens"] == 2
    assert facts(olmo3(*arguments, "--max-tokens", 3))["generation_tokens"] == 3


def test_the_variable_names_the_default_model(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_MODEL", str(tiny_checkpoint))
    answer = facts(olmo3("generate", "Once", "--raw", "--json", "--max-tokens", 1))
    assert answer["model"] == str(tiny_checkpoint)
    assert facts(olmo3("inspect", "--json"))["hidden_size"] == 64
    assert facts(olmo3("inspect", "--json", "--model", "demo"))["hidden_size"] == 256
    assert str(tiny_checkpoint) in "".join(olmo3("generate", "--help").out.split())
    monkeypatch.setenv("OLMO3_MODEL", "")
    assert facts(olmo3("inspect", "--json"))["model"] == "demo"


def test_an_answer_survives_a_screen_that_only_knows_ascii() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = finish(start("inspect", "--model", "7b", env=environment))
    assert (done.code, done.err) == (0, "")
    assert "YaRN ? 8 from 8,192 ? 500,000" in done.out


def test_a_reader_that_leaves_early_ends_the_answer_quietly() -> None:
    process = start("generate", "Once upon a time", "--raw", "--temperature", 0, "--max-tokens", 2000)
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
def test_a_byte_order_mark_and_the_last_newline_are_no_part_of_a_piped_prompt(olmo3: Run) -> None:
    marked = facts(olmo3("generate", "--json", stdin=f"\ufeff{SUM}\r\n"))
    assert marked["prompt_tokens"] == facts(olmo3("generate", "--json", stdin=SUM))["prompt_tokens"] == 57


# Ctrl-C


def test_an_interrupted_answer_keeps_what_was_said(olmo3: Run) -> None:
    arguments = ("generate", "Once upon a time", "--raw", "--temperature", 0, "--max-tokens")
    process = start(*arguments, 3000)
    assert process.stdout is not None
    seen = read_until(process.stdout.fileno(), rb"..........")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 0
    found = re.search(r"generation: (\d+) tokens.* finish: interrupted\n$", done.err)
    assert found, done.err
    assert len(done.err.splitlines()) == 1
    assert 1 < int(found[1]) < 2990
    said = seen.decode() + done.out
    assert said == olmo3(*arguments, found[1]).out


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the user press Ctrl-C, so many times, while the fourth token is on its way."""

    def press(times: int) -> None:
        def stream(*arguments: Any, **options: Any) -> Iterator[Completion]:
            for count, piece in enumerate(olmo3_mlx.stream(*arguments, **options), start=1):
                for _ in range(times if count == 4 else 0):
                    signal.raise_signal(signal.SIGINT)
                yield piece

        monkeypatch.setattr("olmo3_mlx.cli.generate.stream", stream)

    return press


@asks_a_parrot
def test_an_interrupted_answer_is_whole_json(olmo3: Run, interrupted: Callable[[int], None]) -> None:
    interrupted(1)
    done = olmo3("generate", SUM, "--temperature", 0, "--json")
    assert done.err == ""
    answer = facts(done)
    assert list(answer) == JSON_KEYS
    assert answer["finish_reason"] == "interrupted"
    assert answer["generation_tokens"] == len(answer["token_ids"]) == 4
    assert answer["text"] == "Nice to meet you"


@asks_a_parrot
def test_a_second_ctrl_c_ends_the_program(olmo3: Run, interrupted: Callable[[int], None]) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupted(2)
    done = olmo3("generate", SUM, "--temperature", 0)
    assert (done.code, done.err) == (130, "olmo3 generate: interrupted\n")
    assert done.out in ("Nice to meet", "Nice to meet you")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_long_prompt_can_be_interrupted(long_checkpoint: Path) -> None:
    screen, terminal = pty.openpty()  # progress is shown on terminals only
    termios.tcsetwinsize(terminal, (24, 80))
    process = start("generate", "-", "--raw", "--model", long_checkpoint, stderr=terminal)
    os.close(terminal)
    assert process.stdin is not None
    process.stdin.write(b"word " * 40_000)
    process.stdin.close()
    process.stdin = None
    seen = read_until(screen, rb"reading:")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
        while piece := os.read(screen, 65536):
            seen += piece
    os.close(screen)
    assert (done.code, done.out) == (130, "")
    assert seen.rstrip().endswith(b"olmo3 generate: interrupted")
    assert b"Traceback" not in seen
    assert b"reading: 100%" not in seen  # it was not read to its end


class Terminal(io.StringIO):
    """Keeps what is shown on it."""

    def isatty(self) -> bool:
        return True


def test_a_bar_says_what_converting_is_at(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 256)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["convert", str(tiny_checkpoint), str(tmp_path / "dest")]) == 0
    said = dict.fromkeys(re.findall(r"([a-z][a-z, 0-9%]*): +\d+%\|", terminal.getvalue()))
    assert list(said)[:3] == ["beginning", "converting", "reading back"]
    assert list(said)[-1] == "measuring, 100%"


def test_an_interrupted_chat_goes_on_and_remembers_what_was_said(long_checkpoint: Path) -> None:
    process = start("chat", "--temperature", 0, "--model", long_checkpoint)
    assert process.stdin is not None
    assert process.stdout is not None
    for turn in (1, 2):
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        read_until(process.stdout.fileno(), rb".")
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/stats\n")
        process.stdin.flush()
        stats = read_until(process.stdout.fileno(), rb"conversation: .*GB\n")
        found = re.search(rb"conversation: (\d+) messages, (\d+) of 100000 tokens", stats)
        assert found
        assert int(found[1]) == 2 * turn
        assert int(found[2]) > 0
    done = finish(process, b"/exit\n")
    assert done.code == 0
    assert "Traceback" not in done.err
    assert done.err.count("(stopped)\n") == 2


@asks_a_parrot
def test_ctrl_c_at_the_prompt_does_not_leave_the_chat() -> None:
    process = start("chat", "--temperature", 0)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"/none\n")
    process.stdin.flush()
    read_until(process.stderr.fileno(), rb"unknown command /none.*\n")  # from here on it waits for input
    process.send_signal(signal.SIGINT)
    assert b"/exit leaves" in read_until(process.stderr.fileno(), rb"leaves\)\n")
    done = finish(process, f"{SUM}\n".encode())
    assert (done.code, done.out) == (0, f"{ANSWER}\n")


def test_an_interrupted_conversion_says_so(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupted)
    done = olmo3("convert", "--no-card", tiny_checkpoint, tiny_checkpoint.with_name("dest"))
    assert done == (130, "", "olmo3 convert: interrupted\n")


def test_an_interrupted_conversion_that_left_something_says_how_to_go_on(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = ("convert", tiny_checkpoint, tiny_checkpoint.with_name("dest"), "--dtype", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr("convert.conversion.write_model_card", interrupted)
        done = olmo3(*command)
        said = "olmo3 convert: interrupted: what was done is kept, go on with --resume\n"
        assert done == (130, "", said)
    done = olmo3(*command, "--resume")
    assert (done.code, done.err) == (0, "")


def test_resuming_what_was_never_begun_is_said(olmo3: Run, tiny_checkpoint: Path) -> None:
    dest = tiny_checkpoint.with_name("dest")
    command = ("convert", tiny_checkpoint, dest, "--dtype", "bfloat16", "--resume")
    done = olmo3(*command)
    said = f"no conversion to {dest} was begun: there is nothing to resume, this begins one\n"
    assert (done.code, done.err) == (0, said)
    done = olmo3(*command)
    assert done.code == 1
    assert_one_line(done.err, "convert")


@pytest.mark.parametrize("dest", ["/", "no/such/folder/.."])
def test_a_destination_without_a_name_is_refused_in_one_line(
    olmo3: Run, tiny_checkpoint: Path, dest: str
) -> None:
    done = olmo3("convert", tiny_checkpoint, dest)
    assert done.code == 1
    assert_one_line(done.err, "convert")
    assert f"{dest} is no name for a new folder" in done.err


# chat


CHAT_HELP = """\
/retry          answer the last message anew
/edit TEXT      say this instead of the last message
/undo           take the last message and its answer back
/history        what was said
/reset          forget the conversation
/system [TEXT]  show the system message, or start anew with this one
/stats          how the last answer went, and what the conversation holds
/help           this
/exit           leave (Ctrl-D too); Ctrl-C ends an answer
"""
GREETING = "parrot: type a message, /help for commands, Ctrl-D to leave\n"


def chat(olmo3: Run, *lines: str, options: Sequence[object] = ()) -> Done:
    return olmo3("chat", "--temperature", 0, *options, stdin="".join(f"{line}\n" for line in lines))


def test_a_chat_remembers_what_was_said(olmo3: Run) -> None:
    done = chat(olmo3, "My name is Ada.", "What is my name?")
    greeting = GREETING.replace("parrot", "demo")
    assert done == (0, "Nice to meet you, Ada.\nYour name is Ada.\n", greeting)


@asks_a_parrot
def test_a_chat_ends_with_its_input_or_with_exit(olmo3: Run) -> None:
    assert chat(olmo3) == (0, "", GREETING)
    assert chat(olmo3, "/exit", SUM) == (0, "", GREETING)
    assert olmo3("chat", "--temperature", 0, stdin=SUM) == (0, f"{ANSWER}\n", GREETING)


@asks_a_parrot
def test_empty_lines_are_passed_over(olmo3: Run) -> None:
    assert chat(olmo3, "", "   ", SUM, "") == (0, f"{ANSWER}\n", GREETING)


@asks_a_parrot
def test_help_lists_the_commands(olmo3: Run) -> None:
    assert chat(olmo3, "/help") == (0, CHAT_HELP, GREETING)


@asks_a_parrot
def test_an_unknown_command_is_not_sent(olmo3: Run) -> None:
    done = chat(olmo3, "/sytsem Be terse.")
    assert done == (0, "", GREETING + "unknown command /sytsem: /help lists them\n")


@asks_a_parrot
def test_stats_tell_of_the_last_answer_and_of_the_conversation(olmo3: Run) -> None:
    done = chat(olmo3, "/stats", SUM, "/stats", "/reset", "/stats")
    before, answer, last, after, reset = done.out.splitlines()
    assert before == "conversation: 0 messages, 0 of 4096 tokens, caches: 0.000 GB, snapshots: 0.000 GB"
    assert answer == ANSWER
    assert_statistics(last, prompt=57, generated=6, reason="stop")
    assert re.fullmatch(
        r"conversation: 2 messages, 62 of 4096 tokens, caches: 0\.00\d GB, snapshots: 0\.00\d GB", after
    )
    assert reset == before
    assert done.err == GREETING + "(a new conversation)\n"


@asks_a_parrot
def test_only_what_is_new_is_run_on_the_next_turn(olmo3: Run) -> None:
    done = chat(olmo3, SUM, SUM, "/stats")
    found = re.search(r"prompt: (\d+) tokens", done.out)
    assert found
    assert int(found[1]) < 25  # the first turn took 57


@asks_a_parrot
def test_reset_forgets_the_conversation(olmo3: Run) -> None:
    done = chat(olmo3, "My name is Ada.", "/reset", SUM, "/stats")
    assert done.out.startswith(f"{ANSWER}\n{ANSWER}\nprompt: 57 tokens")
    assert "conversation: 2 messages, 62 of 4096" in done.out


@asks_a_parrot
def test_the_system_message_can_be_shown_and_replaced(olmo3: Run) -> None:
    done = chat(olmo3, "/system", "/system Be terse.", "/system", "/stats", "/reset", "/system")
    assert done.out == (
        "(the template's own)\nBe terse.\n"
        "conversation: 1 messages, 0 of 4096 tokens, caches: 0.000 GB, snapshots: 0.000 GB\nBe terse.\n"
    )
    assert done.err == GREETING + 2 * "(a new conversation)\n"
    assert chat(olmo3, "/system", options=["--system", "Be kind."]).out == "Be kind.\n"


@asks_a_parrot
def test_a_message_that_is_too_long_does_not_end_the_chat(olmo3: Run) -> None:
    done = chat(olmo3, "word " * 5000, SUM)
    assert (done.code, done.out) == (0, f"{ANSWER}\n")
    assert re.fullmatch(
        re.escape(GREETING) + r"error: the prompt has \d+ tokens, the context is 4096: .*\n", done.err
    )


@asks_a_parrot
def test_the_last_turn_can_be_answered_anew_edited_and_taken_back(olmo3: Run) -> None:
    lines = ("My name is Ada.", SUM, "/retry", "/edit What is my name?", "/stats", "/undo", "/history")
    done = chat(olmo3, *lines, options=["--temperature", "0"])
    stats = re.search(r"prompt: (\d+) tokens", done.out)
    assert stats
    assert int(stats[1]) < 12  # only what differs from the question before
    assert re.sub(r"prompt: .*\nconversation: .*\n", "", done.out) == (
        f"{ANSWER}\n{ANSWER}\n{ANSWER}\n{ANSWER}\nuser: My name is Ada.\nassistant: {ANSWER}\n"
    )
    assert done.err == GREETING + "(taken back)\n"


@asks_a_parrot
def test_there_must_be_a_turn_to_go_back_to(olmo3: Run) -> None:
    done = chat(olmo3, "/retry", "/edit Hi", "/undo", SUM)
    assert done.out == f"{ANSWER}\n"
    assert done.err.count("error: nothing was said yet") == 3


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sessions are kept during a test."""
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def test_a_session_goes_on_after_a_restart_without_being_read_again(olmo3: Run, sessions: Path) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    first = chat(olmo3, "My name is Ada.", SUM, options=options)
    second = chat(olmo3, "What is my name?", "/stats", options=options)
    assert second.out.startswith("Your name is Ada.\nprompt: 15 tokens")
    greeting = GREETING.replace("parrot", "demo")
    assert second.err == greeting + "(going on after 4 messages, 89 tokens of which are held)\n"
    assert first.err == greeting
    assert len(json.loads((sessions / "ada" / "conversation.json").read_text())["messages"]) == 6


@asks_a_parrot
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda caches: (caches / "caches.json").write_text("{"), "caches.json is damaged"),
        (lambda caches: [p.write_bytes(p.read_bytes()[:-1]) for p in caches.glob("*.full.*")], "cut short"),
        (lambda caches: [p.unlink() for p in caches.glob("*.sliding.*")], "missing"),
    ],
)
def test_a_damaged_session_is_read_again_from_its_text(
    olmo3: Run, sessions: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    chat(olmo3, "My name is Ada.", options=options)
    spoil(sessions / "ada" / "caches")
    again = chat(olmo3, "What is my name?", "/stats", options=options)
    assert again.code == 0
    assert again.out.startswith(f"{ANSWER}\nprompt: 72 tokens")  # the whole conversation
    assert "(going on after 2 messages, which are read again: " in again.err
    assert reason in again.err
    held = chat(olmo3, options=options)  # and what it said then was kept
    assert "(going on after 4 messages, " in held.err
    assert "tokens of which are held" in held.err


@asks_a_parrot
def test_a_session_of_another_form_of_cache_is_read_again(olmo3: Run, sessions: Path) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    chat(olmo3, "My name is Ada.", options=options)
    again = chat(olmo3, "What is my name?", "/stats", options=[*options, "--kv-bits", "8"])
    assert again.out.startswith(f"{ANSWER}\nprompt: 72 tokens")  # the whole conversation
    assert "which are read again: caches.json is of another form of cache" in again.err


@asks_a_parrot
def test_a_session_is_open_in_one_process_only(olmo3: Run, sessions: Path) -> None:
    with open_conversation("ada"):
        done = chat(olmo3, SUM, options=["--session", "ada"])
    assert (done.code, done.out) == (1, "")
    assert "another process has the session ada open" in done.err


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 200])
def test_what_is_no_name_for_a_session_is_refused(olmo3: Run, sessions: Path, name: str) -> None:
    done = chat(olmo3, SUM, options=["--session", name])
    assert (done.code, done.out) == (2, "")
    assert "a session's name must be" in done.err
    assert not sessions.exists()


@asks_a_parrot
def test_a_session_whose_text_is_damaged_is_left_as_it_is(olmo3: Run, sessions: Path) -> None:
    options = ["--session", "ada"]
    chat(olmo3, SUM, options=options)
    path = sessions / "ada" / "conversation.json"
    path.write_text("{not json")
    done = chat(olmo3, SUM, options=options)
    assert (done.code, done.out) == (1, "")
    assert "conversation.json cannot be read" in done.err
    assert path.read_text() == "{not json"


@asks_a_parrot
def test_a_full_disk_does_not_end_the_chat_and_is_told_once(
    olmo3: Run, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    done = chat(olmo3, SUM, SUM, options=["--session", "ada", "--temperature", "0"])
    assert (done.code, done.out) == (0, f"{ANSWER}\n" * 2)
    assert done.err.count("(not saved is what was said: ") == 1
    assert "No space left on device" in done.err


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_chat_with_quantized_caches_remembers_too(olmo3: Run, bits: str) -> None:
    options = ["--kv-bits", bits, "--temperature", "0"]
    done = chat(olmo3, "My name is Ada.", "What is my name?", options=options)
    assert done.out == "Nice to meet you, Ada.\nYour name is Ada.\n"


@asks_a_parrot
def test_a_context_is_obeyed(olmo3: Run) -> None:
    done = olmo3("generate", SUM, "--temperature", "0", "--context", "60")
    assert (done.code, done.out) == (0, "Nice to meet\n")
    assert "finish: length" in done.err
    too_long = olmo3("generate", SUM, "--context", "20")
    assert (too_long.code, too_long.out) == (1, "")
    assert "the prompt has 57 tokens, the context is 20" in too_long.err


@pytest.mark.parametrize(
    ("context", "said"),
    [("0", "at least 1, not 0"), ("-5", "at least 1, not -5"), ("99999", "at most the model's 4,096 tokens")],
)
def test_a_context_that_cannot_be_is_refused(olmo3: Run, context: str, said: str) -> None:
    done = olmo3("generate", SUM, "--context", context)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_what_does_not_fit_the_machine_is_refused_before_loading_with_what_would(
    olmo3: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "60M")
    done = olmo3("generate", SUM, "--context", "4096")
    assert (done.code, done.out) == (1, "")
    found = re.search(r"needs [\d.]+ MiB \(weights .*what fits is --context (\d+)", done.err)
    assert found
    assert olmo3("generate", SUM, "--context", found[1], "--max-tokens", "2").code == 0
    assert olmo3("generate", SUM, "--context", str(int(found[1]) + 1)).code == 1
    assert olmo3("generate", SUM, "--max-tokens", "2").code == 0  # the default fits


@asks_a_parrot
def test_a_chat_takes_the_sampling_options(olmo3: Run) -> None:
    assert chat(olmo3, SUM, options=["--stop", " you"]).out == "Nice to meet\n"


# help and version


def test_the_version_is_the_packages(olmo3: Run) -> None:
    assert olmo3("--version") == (0, f"olmo3 {olmo3_mlx.__version__}\n", "")
    assert metadata.version("olmo3-mlx") == olmo3_mlx.__version__


SAMPLING = [
    "--model", "--revision", "--system", "--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p",
    "--repetition-penalty", "--seed", "--stop",
]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("generate", ["PROMPT", *SAMPLING, "--raw", "--json"]),
        ("chat", [*SAMPLING, "/reset", "/system", "/stats", "/help", "/exit"]),
        ("convert", ["SOURCE", "DEST", "--bits", "--group-size", "--dtype", "--revision"]),
        ("inspect", ["--model", "--revision", "--json", "7b", "32b", "--context", "--kv-bits"]),
        ("revisions", ["HUB_ID", "--json"]),
    ],
)
def test_help_names_every_option(olmo3: Run, verb: str, words: list[str]) -> None:
    done = olmo3(verb, "--help")
    assert (done.code, done.err) == (0, "")
    explained = done.out.partition("\n\n")[2]  # what follows the usage
    for word in words:
        assert re.search(rf"^ *{re.escape(word)}\b|\W{re.escape(word)}\b", explained, re.MULTILINE), word


def test_help_names_every_verb(olmo3: Run) -> None:
    done = olmo3("--help")
    assert done.code == 0
    for verb in ("generate", "chat", "convert", "inspect", "revisions"):
        assert re.search(rf"^    {verb}  +\w", done.out, re.MULTILINE)


def test_convert_is_a_module_too(tiny_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "convert"]
    shown = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, check=False, timeout=FAR_TOO_LONG
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--group-size" in shown.stdout
    dest = tiny_checkpoint.with_name("dest")
    done = subprocess.run(
        [*command, str(tiny_checkpoint), str(dest), "--bits", "8", "--group-size", "32", "--no-card"],
        capture_output=True, text=True, check=False, timeout=FAR_TOO_LONG,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{dest}: ")
    assert (dest / "model.safetensors").is_file()


# inspect


GIB = 2**30


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_inspect_shows_the_published_7b(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "16G")
    done = olmo3("inspect", "--model", "7b")
    assert (done.code, done.err) == (0, "")
    lines = lines_of(done.out)
    assert done.out.splitlines()[0] == "7b: Olmo 3, 7.30 B parameters, context 65,536 tokens"
    for part in (
        "embed_tokens 100,278 × 4,096 410.74 M 5.6%",
        "╭─ 32 blocks: (3 sliding + 1 full) × 8",
        "│ │ self_attn multi-head: 32 query heads, 32 key-value heads of 128 2.15 B 29.4%",
        "│ │ │ q_norm, k_norm: RMSNorm over all 4,096 and all 4,096, before the split into heads",
        "│ │ │ sliding_attention: sees 4,096 tokens, plain RoPE θ 500,000",
        "│ │ │ full_attention: sees all tokens, YaRN × 8 from 8,192 θ 500,000, attention factor 1.2079",
        "│ │ RMSNorm post_attention_layernorm",
        "│ │ mlp SwiGLU 4,096 → 11,008 → 4,096 4.33 B 59.3%",
        "│ │ RMSNorm post_feedforward_layernorm",
        "lm_head 4,096 → 100,278 410.74 M 5.6%",
        "weights alone 13.59 7.22 3.82",
        "This machine has 16.00 GiB for it. The largest contexts that fit, in tokens:",
    ):
        assert part.split() in lines, part
    rows = memory_rows(done.out)
    assert {label: cells[0] for label, cells in rows.items() if "tokens" in label} == {
        "4,096 tokens, bf16 caches": "2.00",
        "4,096 tokens, 8-bit caches": "1.02",
        "4,096 tokens, 4-bit caches": "0.58",
        "16,384 tokens, bf16 caches": "3.73",
        "16,384 tokens, 8-bit caches": "1.90",
        "16,384 tokens, 4-bit caches": "1.08",
        "65,536 tokens, bf16 caches": "9.73",
        "65,536 tokens, 8-bit caches": "4.94",
        "65,536 tokens, 4-bit caches": "2.81",
    }
    assert_the_sums_are_right(rows, (13.59, 7.22, 3.82), 16)
    assert [row[-1] for label, row in rows.items() if label.startswith("with ")] == ["65,536"] * 3


def memory_rows(out: str) -> dict[str, list[str]]:
    """The cells of the memory table and of the largest contexts, by the label of their line."""
    tail = out.partition("weights alone")[2].splitlines()[1:]
    split = [re.split(r" {2,}", line) for line in tail if "caches  " in line]
    return {label: cells for label, *cells in split}


def assert_the_sums_are_right(rows: dict[str, list[str]], weights: tuple[float, ...], machine: float) -> None:
    sums = {label: cells for label, cells in rows.items() if "tokens" in label}
    assert sums
    for caches, working, *totals in sums.values():
        for size, total in zip(weights, totals, strict=True):
            expected = size + float(caches) + float(working)
            assert float(total.rstrip("*")) == pytest.approx(expected, abs=0.021)
            assert total.endswith("*") == (expected > machine)


def test_inspect_shows_the_published_32b(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "32G")
    done = olmo3("inspect", "--model", "32B")
    assert done.code == 0
    lines = lines_of(done.out)
    assert done.out.startswith("32B: Olmo 3, 32.23 B parameters, context 65,536 tokens\n")
    for part in (
        "╭─ 64 blocks: (3 sliding + 1 full) × 16",
        "│ │ self_attn grouped-query: 40 query heads, 8 key-value heads of 128 4.03 B 12.5%",
        "│ │ │ q_norm, k_norm: RMSNorm over all 5,120 and all 1,024, before the split into heads",
        "weights alone 60.04* 31.90 16.89",
        "This machine has 32.00 GiB for it. The largest contexts that fit, in tokens:",
    ):
        assert part.split() in lines, part
    rows = memory_rows(done.out)
    assert_the_sums_are_right(rows, (60.04, 31.90, 16.89), 32)
    for caches in ("bf16", "8-bit", "4-bit"):
        assert rows[f"with {caches} caches"][0] == "none*"
        assert rows[f"with {caches} caches"][2] == "65,536"


def test_the_columns_of_the_memory_table_stand_apart(olmo3: Run) -> None:
    out = olmo3("inspect", "--model", "7b").out
    (head,) = [line for line in out.splitlines() if line.startswith("memory in")]
    assert re.split(r" {2,}", head.rstrip()) == [
        "memory in GiB", "caches", "working", "bf16 weights", "8-bit weights", "4-bit weights",
    ]  # fmt: skip
    assert max(len(line) for line in out.partition("memory in")[2].splitlines()) <= 100


def test_inspect_says_whether_a_context_fits(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "12G")
    done = olmo3("inspect", "--model", "7b", "--context", 16384, "--kv-bits", 8)
    assert (done.code, done.err) == (0, "")
    bf16, eight, four = done.out.splitlines()[-3:]
    assert bf16.startswith("bf16 weights do not fit: a context of 16,384 tokens needs 1")
    assert eight.startswith("8-bit weights: 16,384 tokens fit in ")
    assert "caches 1.90 GiB and working space" in four
    plans = facts(olmo3("inspect", "--model", "7b", "--context", 16384, "--kv-bits", 8, "--json"))["plans"]
    assert [plan["fits"] for plan in plans.values()] == [False, True, True]
    for plan in plans.values():
        assert (plan["context"], plan["kv_bits"], plan["machine"]) == (16384, 8, 12 * GIB)
        assert plan["total"] == plan["weights"] + plan["caches"] + plan["working"]


def test_inspect_finds_the_context_for_a_precision_of_caches(
    olmo3: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "8G")
    found = facts(olmo3("inspect", "--model", "7b", "--kv-bits", 8, "--json"))
    largest = {weights: contexts["8-bit"] for weights, contexts in found["largest_context"].items()}
    assert largest["bf16"] == 0 < largest["4-bit"] == found["plans"]["4-bit"]["context"]
    out = olmo3("inspect", "--model", "7b", "--kv-bits", 8).out
    assert f"4-bit weights: {largest['4-bit']:,} tokens fit in " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", 0], ("context", "0")),
        (["--context", 65537], ("context", "65,536", "65,537")),
        (["--kv-bits", 8, "--kv-group-size", 48], ("kv_group_size", "48")),
        (["--context", 9, "--kv-start", -1], ("kv_start", "-1")),
    ],
)
def test_inspect_refuses_a_wrong_context_in_one_line(
    olmo3: Run, arguments: list[Any], words: tuple[str, ...]
) -> None:
    done = olmo3("inspect", "--model", "7b", *arguments)
    assert done.code == 2
    assert_one_line(done.err, "inspect")
    assert all(word in done.err for word in words)


def test_a_wrong_size_of_memory_is_told_in_one_line(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "lots")
    done = olmo3("inspect", "--model", "7b")
    assert done.code == 2
    assert_one_line(done.err, "inspect")
    assert "OLMO3_MEMORY" in done.err


@pytest.mark.parametrize(
    ("name", "parameters", "matrices"),
    [("7b", 7_298_011_136, 7_297_482_752), ("32b", 32_233_522_176, 32_232_468_480)],
)
def test_inspect_gives_json(olmo3: Run, name: str, parameters: int, matrices: int) -> None:
    found = facts(olmo3("inspect", "--model", name, "--json"))
    assert found["model"] == name
    assert list(found["parameters"]) == ["embedding", "attention", "feed-forward", "norms", "head"]
    assert sum(found["parameters"].values()) == parameters
    norms = parameters - matrices
    assert found["parameters"]["norms"] == norms
    assert found["weight_bytes"] == {
        "bf16": 2 * parameters,
        "8-bit": matrices * 17 // 16 + 2 * norms,
        "4-bit": matrices * 9 // 16 + 2 * norms,
    }
    for key in ("cache_bytes", "working_bytes"):
        assert list(found[key]) == ["bf16", "8-bit", "4-bit"]
        assert list(found[key]["4-bit"]) == ["4096", "16384", "65536"]
    assert "plans" not in found
    assert found["rope"]["full_attention"]["factor"] == 8.0
    assert found["rope"]["sliding_attention"]["rope_type"] == "default"
    assert found["layer_types"].count("full_attention") * 4 == found["num_hidden_layers"]
    assert found["machine_bytes"] > 2**28


def test_inspect_needs_only_a_config(olmo3: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    done = olmo3("inspect", "--model", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{tmp_path}: Olmo 3, ")
    lines = lines_of(done.out)
    for part in (
        "╭─ 4 blocks: (3 sliding + 1 full) × 1",
        "│ │ │ sliding_attention: sees 8 tokens, plain RoPE θ 10,000",
    ):
        assert part.split() in lines, part
    assert [line for line in lines if line[:2] == ["256", "tokens,"]]  # all that it has
    assert "8-bit caches" not in done.out  # heads of 16 cannot be quantized
    assert facts(olmo3("inspect", "--model", tmp_path, "--json"))["hidden_size"] == 64


def test_inspect_draws_other_architectures_as_they_are(olmo3: Run, tmp_path: Path) -> None:
    full = {
        **TINY,
        "layer_types": ["full_attention"] * 4,
        "sliding_window": None,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(full))
    out = olmo3("inspect", "--model", tmp_path).out
    assert "4 blocks: 0 sliding, 4 full" in out
    assert "embed_tokens again (tied)" in out
    assert "sliding_attention" not in out


def test_inspect_tells_how_the_demo_is_quantized(olmo3: Run) -> None:
    out = olmo3("inspect").out
    assert out.startswith(
        "demo: Olmo 3, 10.63 M parameters, context 4,096 tokens\n"
        "weights as they are: 4-bit affine, group size 64: 4.51 bits per weight\n"
    )
    assert "memory in MiB" in out
    assert "stored weights" not in out  # they are what the column of 4 bits says


def test_inspect_shows_what_a_mixed_checkpoint_takes(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(
        'bits = 4\n[layers]\n"*.q_proj" = 8\nlm_head = "none"\n'
        '"*.down_proj" = { bits = 3, group_size = 32 }\n'
    )
    dest = tmp_path / "dest"
    assert (
        olmo3("convert", "--no-card", tiny_checkpoint, dest, "--recipe", tmp_path / "recipe.toml").code == 0
    )
    size = sum(array.nbytes for array in mx.load(str(dest / "model.safetensors")).values())
    found = facts(olmo3("inspect", "--model", dest, "--json"))
    assert list(found["weight_bytes"]) == ["stored", "bf16", "8-bit", "4-bit"]
    assert found["weight_bytes"]["stored"] == size
    parameters = sum(found["parameters"].values())
    said = f"\nweights as they are: mixed, 3 to 8 bits: {8 * size / parameters:.2f} bits per weight\n"
    for there in ("all files", "config and index"):
        out = olmo3("inspect", "--model", dest).out
        assert said in out, there
        (row,) = (line for line in lines_of(out) if line[:2] == ["weights", "alone"])
        assert row[2] == f"{size / 2**20:.2f}", there
        (dest / "model.safetensors").unlink(missing_ok=True)
    (dest / "model.safetensors.index.json").unlink()
    assert "\nweights as they are: mixed, 3 to 8 bits\n" in olmo3("inspect", "--model", dest).out


def test_a_folder_named_like_a_size_is_the_folder(
    olmo3: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("7b").mkdir()
    Path("7b", "config.json").write_text(json.dumps(TINY))
    assert facts(olmo3("inspect", "--model", "7b", "--json"))["hidden_size"] == 64


# convert


def test_convert_prints_what_came_out(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest", "--group-size", 32)
    assert (done.code, done.err) == (0, "")
    sizes = r"\d\.\d{3} bits per weight, 0\.\d\d MB \(was 4\.\d\d MB\), \d+\.\d s\n"
    assert re.fullmatch(re.escape(f"{tmp_path / 'dest'}: ") + sizes, done.out)
    answer = facts(olmo3("generate", "Hello", "--json", "--max-tokens", 1, "--model", tmp_path / "dest"))
    assert answer["generation_tokens"] == 1


def test_convert_measures_what_came_out_unless_told_not_to(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 256)
    text = tmp_path / "text"
    text.write_text("Olmo 3 7B has 32 layers, of which one in four sees everything. " * 200)
    dest = tmp_path / "dest"
    done = olmo3("convert", tiny_checkpoint, dest, "--group-size", 32, "--bits", 2, "--text", text)
    assert done.code == 0
    assert re.search(
        r"^quality: poor \(.*\): KL \d\.\d{5}, same top token \d+\.\d%, perplexity ", done.out, re.M
    )
    assert "the result is poor; try\n  - more bits: `--bits 3`" in done.err
    assert "--group-size" not in done.err
    figures = json.loads((dest / "quality.json").read_text())
    assert figures["verdict"] == "poor"
    assert (dest / "QUALITY.md").is_file()
    assert "**poor**" in (dest / "README.md").read_text()


def test_a_text_too_short_to_measure_on_is_refused_before_the_work(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("Too short.")
    done = olmo3("convert", tiny_checkpoint, tmp_path / "dest", "--text", text)
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "convert")
    assert "the text is too short" in done.err
    assert not list(tmp_path.glob(".dest*"))


def test_a_card_without_the_original_is_refused(olmo3: Run, tmp_path: Path) -> None:
    done = olmo3("convert", "some/model", tmp_path / "dest", "--card", "--no-keep")
    assert (done.code, done.out) == (2, "")
    assert "--no-keep" in done.err


def test_convert_names_the_layers_that_it_left_out(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert done.code == 0
    downs = ", ".join(f"model.layers.{i}.mlp.down_proj" for i in range(4))
    assert done.err == f"not quantized, as the group size does not divide their inputs: {downs}\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (4, None)),
        (["--bits", "8"], (8, None)),
        (["--dtype", "float16"], (None, "float16")),
        (["--bits", "4", "--dtype", "bfloat16"], (4, "bfloat16")),
    ],
    ids=["four bits unless told", "eight", "only cast", "both"],
)
def test_convert_takes_bits_and_dtype(
    olmo3: Run,
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    expected: tuple[int | None, str | None],
) -> None:
    dest = tmp_path / "dest"
    if expected[0]:  # a cast has no groups
        options = [*options, "--group-size", "32"]
    assert olmo3("convert", "--no-card", tiny_checkpoint, dest, *options).code == 0
    config = json.loads((dest / "config.json").read_text())
    assert (config.get("quantization", {}).get("bits"), config.get("dtype")) == expected
    tensors = mx.load(str(dest / "model.safetensors"))
    assert isinstance(tensors, dict)
    assert tensors["model.norm.weight"].dtype == getattr(mx, expected[1] or "float32")


# what bad input gets


def assert_one_line(err: str, verb: str) -> None:
    assert err.startswith(f"olmo3 {verb}: error: "), err
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err


def change_config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        tensors = mx.load(str(folder / "model.safetensors"))
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)

    return rewrite


def cut_weights(keep: Callable[[int], int]) -> Callable[[Path], Any]:
    """Cut the weights' file short; `keep` gets its size and says how much stays."""

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: keep(len(data))])

    return cut


def remove(*names: str) -> Callable[[Path], Any]:
    def gone(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return gone


def template(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def as_it_is(folder: Path) -> None:
    """A checkpoint with nothing wrong."""


def quantize(folder: Path) -> None:
    shutil.move(folder, folder.with_name("plain"))
    convert.convert(folder.with_name("plain"), folder, group_size=32)


def swap(key: str, value: Any) -> Callable[[dict[str, mx.array]], Any]:
    return lambda tensors: tensors.update({key: value})


NORM = "model.norm.weight"
NO_TEMPLATE = remove("chat_template.jinja")
YARN = TINY["rope_scaling"]
GENERATE = ["generate", "Hello", "--max-tokens", "1"]
TOO_LONG = ["generate", "word " * 300, "--raw"]
CHAT = ["chat"]
INSPECT = ["inspect"]
CONVERT = ["convert", "SOURCE", "DEST", "--group-size", "32"]

# What is done to a checkpoint, the command given it, and what the error says.
BAD: dict[str, tuple[Callable[[Path], Any], list[str], tuple[str, ...]]] = {
    "no config.json": (remove("config.json"), GENERATE, ("config.json",)),
    "no config.json, inspect": (remove("config.json"), INSPECT, ("config.json",)),
    "no config.json, convert": (remove("config.json"), CONVERT, ("config.json",)),
    "another architecture": (change_config(model_type="llama"), GENERATE, ("model_type", "olmo3", "llama")),
    "another architecture, inspect": (change_config(model_type="llama"), INSPECT, ("model_type", "llama")),
    "weights cut in the header": (cut_weights(lambda size: 100), GENERATE, ("model.safetensors",)),
    "weights cut in the body": (cut_weights(lambda size: size // 2), GENERATE, ("model.safetensors",)),
    "weights cut, convert": (cut_weights(lambda size: size - 1), CONVERT, ("model.safetensors",)),
    "a missing tensor": (change_tensors(lambda t: t.pop(NORM)), GENERATE, ("lacks", NORM)),
    "an extra tensor": (change_tensors(swap("lm_head.bias", mx.zeros(8192))), GENERATE, ("lm_head.bias",)),
    "a misshapen tensor": (change_tensors(swap(NORM, mx.ones(65))), CHAT, (NORM, "[64]", "[65]")),
    "NaN": (change_tensors(swap(NORM, mx.full(64, math.nan))), GENERATE, (NORM, "NaN")),
    "NaN, convert": (change_tensors(swap(NORM, mx.full(64, math.nan))), CONVERT, (NORM, "NaN")),
    "infinite weights, convert": (change_tensors(swap(NORM, mx.full(64, math.inf))), CONVERT, (NORM,)),
    "an unknown RoPE type": (
        change_config(rope_scaling={**YARN, "rope_type": "ntk"}), GENERATE, ("rope_type", "yarn", "ntk"),
    ),
    "an unknown RoPE type, inspect": (
        change_config(rope_scaling={**YARN, "rope_type": "ntk"}), INSPECT, ("rope_type", "ntk"),
    ),
    "an unknown layer type": (
        change_config(layer_types=["full_attention"] * 3 + ["linear_attention"]),
        GENERATE,
        ("layer_types[3]", "linear_attention"),
    ),
    "heads that do not divide": (
        change_config(num_attention_heads=5, num_key_value_heads=5), INSPECT, ("num_attention_heads", "64"),
    ),
    "a group size that divides no layer": (
        as_it_is, ["convert", "SOURCE", "DEST", "--group-size", "128"], ("group size 128", "64, 96"),
    ),
    "quantizing again": (quantize, CONVERT, ("quantized already", "original")),
    "no tokenizer": (remove("tokenizer.json"), GENERATE, ("tokenizer.json",)),
    "no chat template": (NO_TEMPLATE, GENERATE, ("chat template", "--raw")),
    "no chat template, chat": (NO_TEMPLATE, CHAT, ("chat template",)),
    "a token outside the vocabulary": (
        lambda folder: save_checkpoint(folder, TINY, random_model(TINY).tensors()),
        ["generate", "Hello there", "--raw"],
        ("token id", "vocabulary of 128"),
    ),
    "an empty prompt": (as_it_is, ["generate", ""], ("prompt is empty",)),
    "a prompt of spaces": (as_it_is, ["generate", " \n"], ("prompt is empty",)),
    "an empty raw prompt": (as_it_is, ["generate", "", "--raw"], ("prompt is empty",)),
    "empty standard input": (as_it_is, ["generate", "-"], ("prompt is empty",)),
    "a prompt longer than the context": (as_it_is, TOO_LONG, ("tokens", "context is 256")),
    "a prompt that is no Unicode": (as_it_is, ["generate", "\udcff"], ("Unicode",)),
    "a template that reaches for Python": (
        template("{{ ().__class__.__base__.__subclasses__() }}"), GENERATE, ("chat template", "unsafe"),
    ),
    "a template that refuses": (
        template("{{ raise_exception('only\nhaiku') }}"), GENERATE, ("chat template", "only haiku"),
    ),
    "a template that is none": (template("{% if %}"), GENERATE, ("chat template",)),
    "a template that never ends": (
        template("{% for i in range(10 ** 10) %}x{% endfor %}"), GENERATE, ("chat template",),
    ),
    "a revision of a folder": (as_it_is, [*GENERATE, "--revision", "step1"], ("step1", "folder")),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line_and_exit_code_1(
    olmo3: Run,
    tiny_checkpoint: Path,
    damage: Callable[[Path], Any],
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    damage(tiny_checkpoint)
    dest = tiny_checkpoint.with_name("dest")
    places = {"SOURCE": str(tiny_checkpoint), "DEST": str(dest)}
    given = [places.get(argument, argument) for argument in arguments]
    if arguments[0] != "convert":
        given += ["--model", str(tiny_checkpoint)]
    done = olmo3(*given)
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, arguments[0])
    for word in words:
        assert word in done.err
    assert {path.name for path in dest.parent.iterdir()} <= {"tiny", "plain"}


BAD_NAMES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such folder": (["generate", "hi", "--model", "no/such/folder"], ("no/such/folder", "hub id")),
    "a size for a model": (["generate", "hi", "--model", "7b"], ("7b", "hub id")),
    "a file for a folder": (["inspect", "--model", __file__], ("is a file",)),
    "a revision of the demo": (["generate", "hi", "--max-tokens", "1", "--revision", "x"], ("demo",)),
    "a source that is not there": (["convert", "no/such/folder", "DEST"], ("no/such/folder",)),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_a_model_that_is_not_there_gets_one_line_and_exit_code_1(
    olmo3: Run, tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    done = olmo3(*(str(tmp_path / "dest") if a == "DEST" else a for a in arguments))
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, arguments[0])
    for word in words:
        assert word in done.err


BAD_OPTIONS: dict[str, list[str]] = {
    "max_tokens": ["--max-tokens", "0"],
    "max_tokens, negative": ["--max-tokens", "-5"],
    "temperature": ["--temperature", "-1"],
    "temperature, absurd": ["--temperature", "1e9"],
    "temperature, not a number": ["--temperature", "nan"],
    "temperature, infinite": ["--temperature", "inf"],
    "top_p": ["--top-p", "0"],
    "top_p, above 1": ["--top-p", "1.5"],
    "top_k": ["--top-k", "-1"],
    "min_p": ["--min-p", "-0.1"],
    "min_p, above 1": ["--min-p", "2"],
    "repetition_penalty": ["--repetition-penalty", "0"],
    "repetition_penalty, not a number": ["--repetition-penalty", "nan"],
    "seed": ["--seed", "-1"],
    "seed, too large": ["--seed", str(2**64)],
    "stop": ["--stop", ""],
}


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_an_absurd_option_gets_one_line_and_exit_code_2_before_any_work(
    olmo3: Run, verb: str, option: str
) -> None:
    done = olmo3(verb, *BAD_OPTIONS[option], "--model", "no/such/folder", stdin="hello\n")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, verb)
    assert option.partition(",")[0] in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "hi", "--temperature", "warm"], "--temperature"),
        (["generate", "hi", "there"], "there"),
        (["generate", "hi", "--tempreature", "1"], "--tempreature"),
        (["convert", "source"], "DEST"),
        (["convert", "source", "dest", "--bits", "7"], "--bits"),
        (["convert", "source", "dest", "--group-size", "48"], "--group-size"),
        (["convert", "source", "dest", "--dtype", "int8"], "--dtype"),
        (["inspect", "7b"], "7b"),
        (["dance"], "dance"),
        ([], "VERB"),
    ],
)  # fmt: skip
def test_wrong_usage_gets_the_usage_and_exit_code_2(olmo3: Run, arguments: list[str], words: str) -> None:
    done = olmo3(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: olmo3")
    assert words in done.err.splitlines()[-1]


def test_a_raw_prompt_takes_no_system_message(olmo3: Run) -> None:
    done = olmo3("generate", "hi", "--raw", "--system", "Be terse.")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "generate")


def test_a_published_size_has_no_revision(olmo3: Run) -> None:
    done = olmo3("inspect", "--model", "7b", "--revision", "main")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "inspect")


def test_no_prompt_on_a_terminal_is_wrong_usage(
    olmo3: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, terminal = pty.openpty()
    with os.fdopen(terminal) as keyboard:
        monkeypatch.setattr(sys, "stdin", keyboard)
        assert main(["generate"]) == 2
    os.close(screen)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, "generate")
    assert "PROMPT" in captured.err


@asks_a_parrot
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_standard_input_that_is_no_text_gets_one_line(olmo3: Run, verb: str) -> None:
    done = olmo3(verb, stdin=b"caf\xe9\n")
    assert (done.code, done.out) == (1, "")
    error = done.err.removeprefix(GREETING)
    assert_one_line(error, verb)
    assert "UTF-8" in error


def test_an_existing_destination_is_refused(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "exists already" in done.err
    assert list((tmp_path / "dest").iterdir()) == []


def test_a_destination_that_cannot_be_written_is_refused(olmo3: Run, tiny_checkpoint: Path) -> None:
    done = olmo3("convert", "--no-card", tiny_checkpoint, tiny_checkpoint / "config.json" / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "cannot write to" in done.err


def test_a_full_disk_is_refused(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Usage = namedtuple("Usage", ["total", "used", "free"])  # as shutil.disk_usage gives it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 0))
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "make room" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# the hub


def test_what_the_hub_does_not_give_gets_one_line(
    olmo3: Run, hub: FakeHub, stop_hub: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def assert_told(words: Sequence[str], *arguments: str) -> None:
        done = olmo3("inspect", "--model", *arguments)
        assert (done.code, done.out) == (1, "")
        assert_one_line(done.err, "inspect")
        for word in words:
            assert word in done.err

    assert_told(("olmo/other", "the hub knows no such model"), "olmo/other")
    assert_told(("olmo/tiny", "no revision 'stage9'"), "olmo/tiny", "--revision", "stage9")
    for stop in stop_hub:
        stop()
    assert_told(("network",), "olmo/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_told(("not downloaded yet",), "olmo/tiny")


def test_a_result_that_cannot_chat_is_told_so(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tiny_checkpoint / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    done = olmo3("convert", tiny_checkpoint, tmp_path / "mute", "--dtype", "bfloat16")
    assert done.code == 0
    assert re.fullmatch(r"the result has no tokenizer\.json, .* \(--tokenizer MODEL .*\)\n", done.err)
    done = olmo3("convert", tiny_checkpoint, tmp_path / "quantized", "--group-size", "32")
    assert "not measured: " in done.err
    assert "the result has no tokenizer.json" in done.err
    done = olmo3("convert", tiny_checkpoint, tmp_path / "chats", "--dtype", "bfloat16", "--tokenizer", "demo")
    assert (done.code, done.err) == (0, "")

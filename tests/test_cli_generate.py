"""olmo3 generate: whole outputs, where an answer ends, and Ctrl-C."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    ANSWER,
    SUM,
    Run,
    asks_a_parrot,
    assert_one_line,
    assert_statistics,
    facts,
    finish,
    read_until,
    start,
)

import olmo3_mlx
from olmo3_mlx import load
from olmo3_mlx.cli import main
from olmo3_mlx.conversation.completion import Completion

pytestmark = pytest.mark.usefixtures("a_users_shell")

JSON_KEYS = [
    "text", "token_ids", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps",
    "peak_memory", "finish_reason", "model",
]  # fmt: skip


def test_an_answer_goes_to_stdout_and_statistics_to_stderr(olmo3: Run) -> None:
    done = olmo3("generate", SUM, "--temperature", 0)
    assert (done.code, done.out) == (0, "17 + 25 = 42\n")
    (line,) = done.err.splitlines()
    assert_statistics(line, prompt=57, generated=11, reason="stop")


def test_an_answer_may_be_begun(olmo3: Run) -> None:
    options = (SUM, "--temperature", 0, "--prefill", "17 + 25 =")
    done = olmo3("generate", *options)
    assert (done.code, done.out) == (0, "17 + 25 = 42\n")
    answer = facts(olmo3("generate", *options, "--json"))
    assert answer["text"] == "17 + 25 = 42"
    assert answer["generation_tokens"] == 4  # of what was added
    refused = olmo3("generate", SUM, "--raw", "--prefill", "17")
    assert refused.code == 2
    assert "--prefill needs the chat template, which --raw skips" in refused.err
    assert "the prompt is empty" in olmo3("generate", " ", "--prefill", "17").err


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
def test_a_given_prompt_leaves_alone_what_is_neither_a_pipe_nor_a_file(olmo3: Run) -> None:
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


@asks_a_parrot
def test_a_byte_order_mark_and_the_last_newline_are_no_part_of_a_piped_prompt(olmo3: Run) -> None:
    marked = facts(olmo3("generate", "--json", stdin=f"\ufeff{SUM}\r\n"))
    assert marked["prompt_tokens"] == facts(olmo3("generate", "--json", stdin=SUM))["prompt_tokens"] == 57


def test_a_raw_prompt_takes_no_system_message(olmo3: Run) -> None:
    done = olmo3("generate", "hi", "--raw", "--system", "Be terse.")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "generate")


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


def test_an_interrupted_answer_keeps_what_was_said(olmo3: Run) -> None:
    arguments = ("generate", "Once upon a time", "--raw", "--temperature", 0, "--max-tokens")
    process = start(*arguments, 3000, stdin=subprocess.DEVNULL)
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

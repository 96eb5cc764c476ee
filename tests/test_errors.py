"""Errors: one line each, with options in the spelling of whoever shows them."""

import pytest

from olmo3_mlx.cli import main
from olmo3_mlx.cli.wording import flag, worded
from olmo3_mlx.errors import (
    HubError,
    MemoryFitError,
    NoTemplateError,
    Olmo3Error,
    OptionError,
    Setting,
    UnknownNameError,
    UnknownRevisionError,
)
from olmo3_mlx.memory.machine import memory_ran_out


def test_a_message_is_one_line_whatever_it_was_made_of() -> None:
    assert str(Olmo3Error("a config\n  with two lines:\n\n", Setting("kv_bits", 8))) == (
        "a config with two lines: kv_bits=8"
    )


@pytest.mark.parametrize(
    ("setting", "python", "command"),
    [
        (Setting("context"), "context", "--context"),
        (Setting("kv_bits", 8), "kv_bits=8", "--kv-bits 8"),
        (Setting("context", 1), "context=1", "--context 1"),  # 1 is not True
        (Setting("revision", "main"), "revision='main'", "--revision main"),
        (Setting("resume", True), "resume=True", "--resume"),
        (Setting("keep", False), "keep=False", "--no-keep"),
        (Setting("bits", None), "bits=None", "--dtype alone"),
        (Setting("raw", True), "raw=True", "`olmo3 generate --raw`"),
    ],
)
def test_an_option_is_spelled_for_python_and_for_the_command_line(
    setting: Setting, python: str, command: str
) -> None:
    error = OptionError("leave out ", setting, ", please")
    assert str(error) == f"leave out {python}, please"
    assert error.worded(flag) == worded(error) == f"leave out {command}, please"


def test_the_command_line_adds_the_verb_that_helps() -> None:
    revision = UnknownRevisionError("allenai/Olmo-3-1025-7B", "stage9")
    assert isinstance(revision, HubError)
    assert str(revision) == "allenai/Olmo-3-1025-7B has no revision 'stage9'"
    assert worded(revision) == f"{revision}: `olmo3 revisions allenai/Olmo-3-1025-7B` lists them"
    assert worded(UnknownNameError("7B", "7B: no such folder")).endswith(
        "; `olmo3 inspect` alone knows it, as a size"
    )
    assert worded(UnknownNameError("8B", "8B: no such folder")) == "8B: no such folder"
    assert worded(NoTemplateError()).endswith("continue plain text with `olmo3 generate --raw`")
    assert str(NoTemplateError()).endswith("continue plain text with raw=True")


def test_what_does_not_fit_says_what_would_as_data_and_in_words() -> None:
    nearest = ({"context": 512}, {"weight_bits": 8, "kv_bits": 4})
    error = MemoryFitError("too much: ", needed=3, available=2, nearest=nearest)
    assert (error.needed, error.available, error.nearest) == (3, 2, nearest)
    assert str(error) == "too much: what fits is context=512, or weights of 8 bits with kv_bits=4"
    assert worded(error) == "too much: what fits is --context 512, or weights of 8 bits with --kv-bits 4"
    assert str(MemoryFitError("too much: ", nearest=())) == "too much: nothing fits but a smaller model"
    assert str(MemoryFitError("memory would run out")) == "memory would run out"


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (RuntimeError("[malloc] Unable to allocate 8589934592 bytes."), True),
        (RuntimeError("[METAL] Insufficient Memory (kIOGPUCommandBufferCallbackErrorOutOfMemory)"), True),
        (RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"), True),
        (RuntimeError("[metal::Device] Unable to load kernel"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_not_every_failure_of_mlx_is_for_want_of_memory(error: Exception, ran_out: bool) -> None:
    assert memory_ran_out(error) is ran_out


@pytest.mark.parametrize(
    ("message", "hint"), [("Unable to allocate 1 bytes", True), ("no such kernel", False)]
)
def test_the_command_line_speaks_of_memory_only_where_that_ran_out(
    message: str, hint: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("olmo3_mlx.cli.inspect.MemoryTable.of", fails)
    assert main(["inspect", "--model", "7b"]) == 1
    shown = " (`olmo3 inspect` shows what fits this machine)" if hint else ""
    assert capsys.readouterr().err == f"olmo3 inspect: error: {message}{shown}\n"

"""Commands as users give them: in this process, or as processes of their own; and a model that is quick."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, random_model, save_checkpoint

from olmo3_mlx import Tokenizer
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.cli import main

SUM = "What is 17 + 25?"
ANSWER = "Nice to meet you."
OLMO3 = str(Path(sys.executable).with_name("olmo3"))
FAR_TOO_LONG = 300  # seconds to wait for a process, on however busy a machine
LONG: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": 8192,
    "max_position_embeddings": 100_000,
    "eos_token_id": None,
}
GREETING = "parrot: type a message, /help for commands, Ctrl-D to leave\n"


class Done(NamedTuple):
    """How a command went."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


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


STARTED: "list[subprocess.Popen[bytes]]" = []


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


def assert_one_line(err: str, verb: str) -> None:
    assert err.startswith(f"olmo3 {verb}: error: "), err
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err


@pytest.fixture
def a_users_shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model by default, Ctrl-C that works, and no process that outlives its test.

    Whoever runs the tests in the background has Ctrl-C ignored, which a command would inherit.
    """
    monkeypatch.delenv("OLMO3_MODEL", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    while STARTED:
        with STARTED.pop() as process:  # closes its pipes
            process.kill()


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and no end token: an answer goes on until somebody stops it."""
    return save_checkpoint(tmp_path_factory.mktemp("long") / "model", LONG, random_model(LONG).tensors())


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
def parrot(parrot_checkpoint: Path, a_users_shell: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it the default model."""
    monkeypatch.chdir(parrot_checkpoint.parent)
    monkeypatch.setenv("OLMO3_MODEL", "parrot")


asks_a_parrot = pytest.mark.usefixtures("parrot")

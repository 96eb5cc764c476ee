"""The command line as a whole: its verbs, their options, and the default model."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from command_line import Run, facts

import olmo3_mlx

pytestmark = pytest.mark.usefixtures("a_users_shell")


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
        ("doctor", ["--model", "--revision", "--json"]),
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
    for verb in ("generate", "chat", "convert", "inspect", "revisions", "doctor"):
        assert re.search(rf"^    {verb}  +\w", done.out, re.MULTILINE)


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

"""The command line as a whole: its verbs, their options, and the default model."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from command_line import Run, facts

import olmo3_mlx

CLI = Path(olmo3_mlx.__file__).with_name("cli")

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
        ("chat", ["MODEL", *SAMPLING, "/reset", "/system", "/stats", "/help", "/exit"]),
        ("convert", ["SOURCE", "DEST", "--bits", "--group-size", "--dtype", "--revision"]),
        (
            "inspect",
            ["MODEL", "-m", "--model", "--revision", "--json", "7b", "32b", "--context", "--kv-bits"],
        ),
        ("revisions", ["HUB_ID", "--json"]),
        ("sessions", ["--remove", "--json"]),
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
    verbs = [file.stem for file in CLI.glob("*.py") if "def add_parser" in file.read_text()]
    assert len(verbs) > 5
    for verb in verbs:
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
        (["dance"], "dance"),
        ([], "VERB"),
    ],
)  # fmt: skip
def test_wrong_usage_gets_the_usage_and_exit_code_2(olmo3: Run, arguments: list[str], words: str) -> None:
    done = olmo3(*arguments)
    assert (done.code, done.out) == (2, "")
    verb = arguments[0] if arguments and arguments[0] != "dance" else "VERB"
    assert done.err.startswith(f"usage: olmo3 {verb} " if verb != "VERB" else "usage: olmo3 [-h]")
    assert words in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["genrate", "hi"], "; did you mean generate?"),
        (["Chat"], "; did you mean chat?"),
        (["dance"], "sessions, doctor)"),  # nothing is like it
        (["generate", "hi", "--tempreature", "1"], "; did you mean --temperature instead of --tempreature?"),
        (["generate", "hi", "--tokens=5"], "; did you mean --max-tokens instead of --tokens?"),
        (["inspect", "--modle", "7b"], "; did you mean --model instead of --modle?"),
        (["convert", "source", "--bist"], "required: DEST; did you mean --bits instead of --bist?"),
        (["convert", "source", "dest", "--mode", "afine"], "; did you mean affine?"),
        (["convert", "source", "dest", "--dtype", "BFLOAT"], "; did you mean bfloat16?"),
        (["generate", "hi", "--qqq"], "unrecognized arguments: --qqq"),
        (["generate", "--", "hi", "--tempreature"], "unrecognized arguments: --tempreature"),
    ],
)
def test_a_misspelt_verb_flag_or_choice_gets_the_nearest_one(
    olmo3: Run, arguments: list[str], end: str
) -> None:
    done = olmo3(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(f"{end}\n")


@pytest.mark.parametrize("arguments", [["7b"], ["-m", "7b"], ["--json", "7b"], ["--model=7b"]])
def test_a_model_is_given_by_itself_or_with_a_flag(olmo3: Run, arguments: list[str]) -> None:
    given = arguments if "--json" in arguments else [*arguments, "--json"]
    assert facts(olmo3("inspect", *given))["model"] == "7b"


@pytest.mark.parametrize("verb", ["inspect", "chat"])
@pytest.mark.parametrize("arguments", [["7b", "--model", "demo"], ["-m", "demo", "7b"], ["7b", "-m", "7b"]])
def test_a_model_given_both_ways_is_refused(olmo3: Run, verb: str, arguments: list[str]) -> None:
    done = olmo3(verb, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"usage: olmo3 {verb} ")
    assert done.err.endswith(
        f"olmo3 {verb}: error: the model is given twice, by itself and with --model: leave one out\n"
    )


def test_a_chat_takes_its_model_by_itself(olmo3: Run, tiny_checkpoint: Path) -> None:
    done = olmo3("chat", tiny_checkpoint, stdin="/exit\n")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{tiny_checkpoint}: type a message")


def test_a_misspelt_model_gets_the_nearest_one(
    olmo3: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("olmo-seven", "models/olmo-seven", "models/only-a-folder"):
        Path(folder).mkdir(parents=True)
    for folder in ("olmo-seven", "models/olmo-seven"):
        Path(folder, "config.json").write_text(json.dumps({}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for verb, name, meant in (
        ("generate", "dmeo", "demo"),
        ("inspect", "7bb", "7b"),
        ("inspect", "8b", "7b"),
        ("inspect", "Demmo", "demo"),
        ("generate", "olmo_seven", "olmo-seven"),
        ("inspect", "models/olmo_sevn", "models/olmo-seven"),  # it might be a hub id
        ("inspect", f"{tmp_path}/models/olmo-seve", f"{tmp_path}/models/olmo-seven"),
        ("inspect", "models/only-a-foldr", None),
        ("generate", "7bb", None),  # inspect alone knows sizes
        ("generate", "no/such/folder", None),
    ):
        done = olmo3(verb, *(["hi"] if verb == "generate" else []), "--model", name)
        assert (done.code, done.out) == (1, "")
        assert len(done.err.splitlines()) == 1
        assert done.err.endswith(f"; did you mean {meant}?\n") if meant else "did you mean" not in done.err, (
            name
        )


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

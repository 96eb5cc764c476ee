"""`olmo3 compare`: reports, JSON, cards, and one line for whatever goes wrong."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from command_line import Run
from conftest import TINY, random_model, save_checkpoint
from native_writer import run_config, write_native

from convert import compare
from olmo3_mlx.errors import Olmo3Error, OptionError

CONFIG = {**TINY, "vocab_size": 8192, "eos_token_id": [8190, 8188]}
KINDS = ["prose", "documents", "code", "conversations"]
FEW = ("--tokens", 64, "--length", 32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and what 4 bits make of it."""
    folder = tmp_path_factory.mktemp("pair")
    model = random_model(CONFIG)
    original = save_checkpoint(folder / "plain", CONFIG, model.tensors())
    nn.quantize(model, group_size=32, bits=4)
    quantized = {"quantization": {"group_size": 32, "bits": 4}}
    return original, save_checkpoint(folder / "4bit", {**CONFIG, **quantized}, model.tensors())


def test_a_report_says_what_was_lost_and_what_to_try(olmo3: Run, pair: tuple[Path, Path]) -> None:
    done = olmo3("compare", *pair, *FEW)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{pair[0]} → {pair[1]}"
    assert lines[1] == f"on 8 × 32 tokens of 4 texts ({', '.join(KINDS)})"
    assert [line.split()[0] for line in lines[4:9]] == [*KINDS, "all"]
    assert "of an 8B in llama.cpp's table" in done.out
    for label in (
        "size",
        "bits per weight",
        "worst text",
        "largest KL",
        "hidden states",
    ):
        assert any(line.startswith(f"  {label}") for line in lines), label
    assert "bits per weight 32.00 → 6.0" in done.out
    assert "of 248 positions" in done.out
    worst = max(lines[4:8], key=lambda line: float(line.split()[1])).split()[0]
    assert any(re.match(rf"(good|fair|poor) on {worst}: ", line) for line in lines)
    assert f"  worst text      {worst}, " in done.out
    assert done.err == ""


def test_advice_is_of_groups_that_divide_what_was_left_out(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The width of TINY's feed-forward is 96, which 64 does not divide and 32 does."""
    message = "--group-size 32 with more bits: 32 divides the inputs of down_proj too"
    done = olmo3("convert", pair[0], tmp_path / "2bit", "--bits", 2)
    assert message in done.err.replace("`", "")
    assert message in olmo3("compare", pair[0], tmp_path / "2bit", *FEW).out
    done = olmo3("convert", pair[0], tmp_path / "even", "--bits", 2, "--group-size", 32)
    assert "divides" not in done.err


def test_a_checkpoint_beside_itself_is_identical(olmo3: Run, pair: tuple[Path, Path]) -> None:
    done = olmo3("compare", pair[0], pair[0], *FEW)
    assert done.code == 0
    assert "identical: both models say the same everywhere" in done.out
    assert "to come closer" not in done.out
    assert "0.00000 ± 0.00000" in done.out


def test_json_is_one_line_with_every_figure_and_the_card_holds_the_same(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The rain had stopped before noon, and the road was dry again. " * 30)
    done = olmo3("compare", *pair, *FEW, "--text", text, "--json", "--card", tmp_path)
    assert done.code == 0
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert [text["kind"] for text in found["texts"]] == ["text.txt"] == list(found["kinds"])
    assert found["tokens"] == 2 * 31
    names = {"original": "plain", "result": "4bit"}
    names["command"] = "olmo3 compare plain 4bit --tokens 64 --length 32 --text text.txt"
    assert {**found, **names} == json.loads((tmp_path / "quality.json").read_text())
    assert f"\n{names['command']}\n" in (tmp_path / "QUALITY.md").read_text()
    assert "**›**" in (tmp_path / "QUALITY.md").read_text()


def test_several_files_are_measured_apart_conversations_through_the_template(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rain.txt").write_text("The rain had stopped before noon, and the road was dry again. " * 30)
    messages = [{"role": "user", "content": "Is it dry?"}, {"role": "assistant", "content": "It is."}]
    Path("chats.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 9)
    done = olmo3("compare", *pair, *FEW, "--text", "rain.txt", "chats.jsonl")
    kinds = ["rain.txt", "chats.jsonl"]
    assert done.out.splitlines()[1] == "on 4 × 32 tokens of 2 texts (rain.txt, chats.jsonl)"
    assert [line.split()[0] for line in done.out.splitlines()[4:7]] == [*kinds, "all"]
    found = json.loads(olmo3("compare", *pair, *FEW, "--text", *kinds, "--json").out)
    assert list(found["kinds"]) == kinds
    assert json.loads(olmo3(*shlex.split(found["command"])[1:], "--json").out) == found
    assert compare(*pair, tokens=64, length=32, text=kinds).quality.kl_mean == found["kl_mean"]
    alone = json.loads(olmo3("compare", *pair, *FEW, "--text", "chats.jsonl", "--json").out)
    assert alone["kl_mean"] == pytest.approx(found["kinds"]["chats.jsonl"]["kl_mean"], rel=1e-6)
    renamed = Path(shutil.copytree(pair[0], "stage"))
    words = (renamed / "tokenizer.json").read_text().replace("<|im_end|>", "<|renamed|>")
    (renamed / "tokenizer.json").write_text(words)
    assert olmo3("compare", pair[0], renamed, *FEW, "--text", "chats.jsonl").code == 0
    done = olmo3("compare", *pair, *FEW, "--text", "rain.txt", "rain.txt")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "rain.txt is named twice" in done.err


def test_a_base_checkpoint_is_not_measured_on_conversations(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base", ignore=shutil.ignore_patterns("chat_template*"))
    found = json.loads(olmo3("compare", base, pair[1], *FEW, "--json").out)
    assert list(found["kinds"]) == KINDS[:-1]
    assert found["decided_by"] in KINDS[:-1]


def test_a_cards_folder_is_made_and_a_card_that_it_holds_is_not_overwritten(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "card"
    assert olmo3("compare", *pair, *FEW, "--card", folder).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "QUALITY.md" in before
    done = olmo3("compare", pair[0], pair[0], *FEW, "--card", folder)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "holds a card already (QUALITY.md, quality.json): name another folder, or remove it" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_on_the_card_measures_the_same_again(olmo3: Run, pair: tuple[Path, Path]) -> None:
    found = json.loads(olmo3("compare", *pair, "--tokens", 40, "--json").out)
    assert {(text["sequences"], text["length"]) for text in found["texts"]} == {(1, 40)}
    again = json.loads(olmo3(*found["command"].split()[1:], "--json").out)
    assert again == found


def test_a_card_tells_nothing_of_where_on_the_disk_it_was_made(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 64)
    monkeypatch.chdir(tmp_path)
    Path("plain").symlink_to(pair[0])
    Path("text.txt").write_text("The rain had stopped before noon, and the road was dry again. " * 30)
    source, options = tmp_path / "plain", ("--text", tmp_path / "text.txt", "--tokenizer", pair[0])
    assert olmo3("convert", source, tmp_path / "result", "--group-size", 32, *options).code == 0
    Path("card").mkdir()
    done = olmo3("compare", source, tmp_path / "result", *options, *FEW, "--card", "card")
    assert f"{source} → {tmp_path / 'result'}" in done.out
    for file in [*Path("result").iterdir(), *Path("card").iterdir()]:
        for place in (tmp_path, pair[0].parent):
            assert str(place).encode() not in file.read_bytes(), file
    figures = json.loads(Path("result", "quality.json").read_text())
    assert (figures["original"], figures["result"]) == ("plain", "result")
    again = json.loads(olmo3(*shlex.split(figures["command"])[1:], "--json").out)
    assert (again["kl_mean"], again["texts"]) == (figures["kl_mean"], figures["texts"])


def test_stages_of_training_whose_tags_have_other_names_can_be_compared(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    stage = shutil.copytree(pair[0], tmp_path / "stage")
    file = stage / "tokenizer.json"
    text = file.read_text()
    assert "<|im_end|>" in text
    file.write_text(text.replace("<|im_end|>", "<|renamed|>"))
    assert olmo3("compare", pair[0], stage, *FEW).code == 0
    other = json.loads(text)
    vocabulary = other["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]
    file.write_text(json.dumps(other))
    done = olmo3("compare", pair[0], stage, *FEW)
    assert (done.code, done.out) == (2, "")
    assert f"its tokenizer reads the text differently from that of {pair[0]}: " in done.err


def test_a_result_without_a_tokenizer_is_read_with_the_originals(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = shutil.copytree(pair[1], tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    assert olmo3("compare", pair[0], bare, *FEW).code == 0


def test_another_tokenizer_is_taken_instead_of_the_originals(
    olmo3: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = shutil.copytree(pair[0], tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    done = olmo3("compare", bare, pair[1], *FEW)
    assert (done.code, done.out) == (1, "")
    assert "say with --tokenizer MODEL whose to take" in done.err
    assert olmo3("compare", bare, pair[1], *FEW, "--tokenizer", tmp_path).code == 1
    usual = json.loads(olmo3("compare", *pair, *FEW, "--json").out)
    found = json.loads(olmo3("compare", bare, pair[1], *FEW, "--tokenizer", "demo", "--json").out)
    assert found["kl_mean"] == usual["kl_mean"]
    assert json.loads(olmo3(*shlex.split(found["command"])[1:], "--json").out) == found


def test_the_command_on_a_native_checkpoints_card_measures_the_same_again(
    olmo3: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 64)
    native = write_native(tmp_path / "step1", run_config(CONFIG, 8192), random_model(CONFIG).tensors())
    done = olmo3("convert", native, tmp_path / "dest", "--group-size", 32, "--tokenizer", "demo")
    assert done.code == 0
    figures = json.loads((tmp_path / "dest" / "quality.json").read_text())
    assert f"\n{figures['command']}\n" in (tmp_path / "dest" / "QUALITY.md").read_text()
    monkeypatch.chdir(tmp_path)
    again = json.loads(olmo3(*shlex.split(figures["command"])[1:], "--json").out)
    assert (again["kl_mean"], again["texts"]) == (figures["kl_mean"], figures["texts"])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--tokens", 1), 2, "--tokens must be at least 2, not 1"),
        (
            ("--tokens", 10**6, "--length", 32),
            2,
            "prose of olmo3-mlx is too short: 1000000 tokens are needed",
        ),
        (("--length", 300), 2, "as many as the context, 256, not 300"),
        (("--length", 1), 2, "sequences of 2 or more tokens"),
        (("--text", "/nonexistent.txt"), 2, "/nonexistent.txt: the text cannot be read"),
        (("--card", __file__), 2, "test_compare.py: expected a folder"),
        (
            ("--card", f"{__file__}/card"),
            2,
            "test_compare.py/card: the folder cannot be made (Not a directory)",
        ),
        (("--revision-a", "main"), 1, "plain is a folder here: --revision-a main is for hub ids"),
        (("--revision-b", "main"), 1, "4bit is a folder here: --revision-b main is for hub ids"),
    ],
)
def test_options_that_cannot_be_are_one_line_before_the_work(
    olmo3: Run, pair: tuple[Path, Path], options: tuple[object, ...], code: int, said: str
) -> None:
    done = olmo3("compare", *pair, *options)
    assert done.code == code
    assert done.out == ""
    assert said in done.err
    assert done.err.count("\n") == 1


def test_what_cannot_be_compared_is_one_line(olmo3: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = {**CONFIG, "num_hidden_layers": 2}
    other = save_checkpoint(tmp_path / "other", config, random_model(config).tensors())
    done = olmo3("compare", pair[0], other, *FEW)
    assert done.code == 1
    assert "they differ in num_hidden_layers (4 and 2)" in done.err
    assert olmo3("compare", pair[0], tmp_path / "none", *FEW).code == 1


def test_a_token_of_the_text_outside_the_vocabulary_is_refused(olmo3: Run, tmp_path: Path) -> None:
    small = save_checkpoint(tmp_path / "small", {**TINY}, random_model(TINY).tensors())
    done = olmo3("compare", small, small, *FEW)
    assert done.code == 1
    assert "is outside the model's vocabulary of 128" in done.err


def test_nothing_of_the_card_is_left_if_it_is_not_asked_for(
    olmo3: Run, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert olmo3("compare", *pair, *FEW).code == 0
    assert not list(tmp_path.iterdir())
    assert not [path for folder in pair for path in folder.glob("*uality*")]


# from Python


def test_two_checkpoints_are_compared_from_python(
    pair: tuple[Path, Path], tmp_path: Path, olmo3: Run
) -> None:
    seen: list[tuple[int, int]] = []
    comparison = compare(
        *pair, tokens=64, length=32, card=tmp_path / "card", progress=lambda *counts: seen.append(counts)
    )
    assert (comparison.original, comparison.result) == tuple(map(str, pair))
    assert comparison.verdict in ("good", "fair", "poor")
    assert comparison.quality.tokens == 4 * 62
    assert {kind: each.tokens for kind, each in comparison.quality.kinds.items()} == dict.fromkeys(KINDS, 62)
    assert not comparison.flattered
    assert seen[-1][0] == seen[-1][1]
    assert json.loads(json.dumps(comparison.figures())) == json.loads(
        olmo3("compare", *pair, *FEW, "--json").out
    )
    figures = json.loads((tmp_path / "card" / "quality.json").read_text())
    assert figures == json.loads(json.dumps(comparison.without_paths().figures()))
    assert figures["command"] == "olmo3 compare plain 4bit --tokens 64 --length 32"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tokens": 1}, OptionError, r"^tokens must be at least 2, not 1$"),
        ({"card": __file__}, OptionError, r"^card='.*test_compare\.py': expected a folder$"),
        ({"revision_a": "main"}, Olmo3Error, "is a folder here"),
    ],
)
def test_the_library_says_what_cannot_be_compared_in_its_own_language(
    pair: tuple[Path, Path], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        compare(*pair, **options)


@pytest.mark.parametrize("wrong", ["64", 64.5, True, []])
@pytest.mark.parametrize("name", ["tokens", "length"])
def test_a_number_of_tokens_is_a_whole_one(name: str, wrong: Any) -> None:
    options: dict[str, Any] = {name: wrong}
    with pytest.raises(OptionError, match=f"{name} must be a whole number.*, not "):
        compare("demo", "demo", **options)


@pytest.mark.parametrize(
    "name", ["a", "b", "text", "tokenizer", "revision_a", "revision_b", "card", "progress"]
)
def test_an_argument_of_another_type_is_refused_by_its_name(name: str) -> None:
    arguments: dict[str, Any] = {"a": "demo", "b": "demo", name: 7}
    with pytest.raises(OptionError, match=f"^{name} must be .*, not 7$"):
        compare(**arguments)


def test_sequences_are_no_longer_than_both_models_take(pair: tuple[Path, Path]) -> None:
    assert compare(*pair, tokens=300).texts.tokens.shape == (4, 256)
